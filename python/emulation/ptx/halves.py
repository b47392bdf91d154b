"""Functions of 16 bits that bitwise code computes, as tables of their 65,536 results.

A kernel can test the bits of an element (is it finite?) or replace it (by 0 if it is not) in many
ways. All of them have the same table, which gives the result for every value of the element without
further reasoning. Registers hold pairs of elements; an operation is
followed where no bit crosses from one half to the other, for all values of both.

Terms: ``of N(x)`` is the table N of the 16-bit term x, ``bit N(x)`` is a predicate, and
``or16(...)`` is the bitwise or of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

ONES = 0xFFFF
NUMBERS = np.arange(1 << 16, dtype=np.uint32)
IDENTITY = 0  # the number of the table that changes nothing
_EXPONENT = {"f16": 0x7C00, "bf16": 0x7F80}


def _not_finite(table: np.ndarray, ones: int) -> np.ndarray:
    return (table & ones) == ones


# Operations on a table and a number.
_MAPS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "not": lambda table, _: table ^ ONES,
    "add": np.add,
    "shr": np.right_shift,
    "shl": np.left_shift,
    "mul": np.multiply,
    "is not 0": lambda table, _: table != 0,
    "is": np.equal,
    "is negative": lambda table, _: table > 0x7FFF,
    "not finite": _not_finite,
    "finite or 0": lambda table, ones: np.where(_not_finite(table, ones), 0, table),
}


_OPERATIONS = {
    "and.b32": "and", "or.b32": "or", "not.b32": "not", "add.s32": "add", "mul.lo.s32": "mul",
    "shr.u32": "shr", "setp.lt.s32": "is negative",
    **{f"setp.{relation}.{kind}32": relation for relation in ("eq", "ne") for kind in "sub"},
}  # fmt: skip


class TermTable(Protocol):
    """The methods of `terms.Terms` that this module calls."""

    nodes: list[tuple]

    def constant(self, bits: int, width: int) -> int: ...
    def value(self, term: int) -> tuple[int, int] | None: ...
    def one(self, operation: str, *arguments: int) -> int: ...
    def group(self, operation: str, members: Sequence[int]) -> int: ...
    def any(self, predicates: Iterable[int]) -> int: ...


class Halves:
    """Tables of a table of terms."""

    def __init__(self, terms: TermTable) -> None:
        self.terms = terms
        self.tables: list[np.ndarray] = []
        # For each table its largest result, and whether it is constant.
        self.largest: list[int] = []
        self.is_constant: list[bool] = []
        self._numbers: dict[bytes, int] = {}
        self._mapped: dict[tuple, int] = {}
        self._number(NUMBERS)

    def _number(self, table: np.ndarray) -> int:
        table = (table & ONES).astype(np.uint32)
        number = self._numbers.setdefault(table.tobytes(), len(self.tables))
        if number == len(self.tables):
            self.tables.append(table)
            self.largest.append(int(table.max()))
            self.is_constant.append(bool((table == table[0]).all()))
        return number

    def take(self, x: int) -> tuple[int, int]:
        """A 16-bit term as a table of another one."""
        if value := self.terms.value(x):
            return x, self._number(np.full_like(NUMBERS, value[0]))
        node = self.terms.nodes[x]
        return (node[1], int(node[0][3:])) if node[0].startswith("of ") else (x, IDENTITY)

    def put(self, base: int, number: int, kind: str = "of", width: int = 16) -> int:
        table = self.tables[number]
        if value := self.terms.value(base):
            return self.terms.constant(int(table[value[0]]), width)
        if self.is_constant[number]:
            return self.terms.constant(int(table[0]), width)
        if kind == "of" and number == IDENTITY:
            return base
        return self.terms.group(f"{kind} {number}", (base,))

    def mapped(self, number: int, name: str, value: int = 0) -> int:
        key = (number, name, value)
        if key not in self._mapped:
            table = _MAPS[name](self.tables[number], np.uint32(value))
            self._mapped[key] = self._number(table.astype(np.uint32))
        return self._mapped[key]

    def _map(self, x: int, name: str, value: int = 0) -> int:
        base, number = self.take(x)
        return self.put(base, self.mapped(number, name, value))

    def _test(self, x: int, name: str, value: int = 0) -> int:
        base, number = self.take(x)
        return self.put(base, self.mapped(number, name, value), "bit", 1)

    # Predicates of an element

    def not_finite(self, x: int, kind: str) -> int:
        """The predicate that an element is NaN or infinite."""
        return self._test(x, "not finite", _EXPONENT[kind])

    def finite_or_zero(self, x: int, kind: str) -> int:
        return self._map(x, "finite or 0", _EXPONENT[kind])

    # Operations on registers.

    def members(self, x: int) -> tuple[int, ...]:
        node = self.terms.nodes[x]
        return node[1:] if node[0] == "or16" else (x,)

    def _union(self, terms: set[int]) -> int:
        zero = self.terms.constant(0, 16)
        terms = terms - {zero} or {zero}
        return terms.pop() if len(terms) == 1 else self.terms.group("or16", sorted(terms))

    def _split(self, x: int, any_register: bool = False) -> tuple[int, int] | None:
        """The halves of a register, if it is made of two."""
        node = self.terms.nodes[x]
        if any_register or node[0] in ("pair", "constant"):
            return self.terms.one("lo", x), self.terms.one("hi", x)
        return None

    def simplified(self, operation: str, arguments: tuple[int, ...]) -> int | None:
        """The term of an operation on a register of two elements, or None."""
        values = [self.terms.value(x) for x in arguments]
        number = values[-1][0] if values[-1] else None
        if operation == "setp.lt.s16":
            known = self.terms.nodes[arguments[0]][0].startswith("of ")
            return self._test(arguments[0], "is negative") if known and number == 0 else None
        if operation not in _OPERATIONS or all(values):
            return None
        if values[0]:
            arguments, number = arguments[::-1], values[0][0]  # of operations in either order
            if operation not in ("and.b32", "or.b32", "add.s32"):
                return None
        # Together with a number, any register is two halves.
        is_bitwise = operation in ("and.b32", "or.b32")
        halves = self._split(arguments[0], is_bitwise and number is not None)
        if halves is None:
            return None
        if is_bitwise:
            other = self._split(arguments[1])
            rule = self._and if operation == "and.b32" else self._or
            if other is None:
                return None
            return self._pair([rule(x, y) for x, y in zip(halves, other, strict=True)])
        if _OPERATIONS[operation] in ("eq", "ne"):
            equal = None if number is None else self._equality(halves, number)
            if equal is None or operation.startswith("setp.eq"):
                return equal
            return self.terms.one("not.pred", equal)
        if operation == "shr.u32" and number is not None and number < 16:
            return self._shift(halves, number)
        if any(self.terms.nodes[half][0] == "or16" for half in halves):
            return None
        if operation == "setp.lt.s32":
            return self._test(halves[1], "is negative") if number == 0 else None
        if operation == "not.b32":
            return self._pair([self._map(half, "not") for half in halves])
        return self._arithmetic(_OPERATIONS[operation], halves, number)

    def _arithmetic(self, name: str, halves: Sequence[int], number: int | None) -> int | None:
        """add or mul by a number, if nothing crosses from a half to the other."""
        if number is None or number > ONES and name != "add":
            return None
        largest = self.largest[self.take(halves[0])[1]]
        if (largest + (number & ONES) if name == "add" else largest * number) > ONES:
            return None
        parts = (number & ONES, number >> 16) if name == "add" else (number, number)
        return self._pair(
            [self._map(half, name, part) for half, part in zip(halves, parts, strict=True)]
        )

    def _shift(self, halves: Sequence[int], number: int) -> int | None:
        """Shifts to the right; bits of the high half cross to the low one."""
        low, high = (self.members(half) for half in halves)
        crossing = {self._map(x, "shl", 16 - number) for x in high}
        return self._pair(
            [
                self._union({self._map(x, "shr", number) for x in low} | crossing),
                self._union({self._map(x, "shr", number) for x in high}),
            ]
        )

    def _equality(self, halves: Sequence[int], number: int) -> int | None:
        """The predicate that a register is a number, where one half decides."""
        if number == 0:
            members = [x for half in halves for x in self.members(half)]
            differs = self.terms.any(self._test(x, "is not 0") for x in members)
            return self.terms.one("not.pred", differs)
        if any(self.terms.nodes[half][0] == "or16" for half in halves):
            return None
        parts = number & ONES, number >> 16
        tests = [self._test(half, "is", part) for half, part in zip(halves, parts, strict=True)]
        never, always = self.terms.constant(0, 1), self.terms.constant(1, 1)
        if never in tests:
            return never
        left = [test for test in tests if test != always] or [always]
        return left[0] if len(left) == 1 else None

    def _pair(self, halves: Sequence[int | None]) -> int | None:
        known = [half for half in halves if half is not None]
        return self.terms.one("pair", *known) if len(known) == 2 else None

    def _and(self, x: int, y: int) -> int | None:
        if self.terms.value(x):
            x, y = y, x
        if value := self.terms.value(y):
            return self._union({self._map(member, "and", value[0]) for member in self.members(x)})
        (base, a), (other, b) = self.take(x), self.take(y)
        if base != other or self.terms.nodes[base][0] == "or16":
            return None
        return self.put(base, self._number(self.tables[a] & self.tables[b]))

    def _or(self, x: int, y: int) -> int | None:
        if self.terms.value(x):
            x, y = y, x
        if (value := self.terms.value(y)) and value[0]:
            if value[0] == ONES:
                return y
            return self._union({self._map(member, "or", value[0]) for member in self.members(x)})
        return self._union({*self.members(x), *self.members(y)})
