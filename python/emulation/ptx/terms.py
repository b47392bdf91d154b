"""Values as expressions: hash-consed terms in the place of numbers.

A term is a number that stands for an expression over leaves, the elements of tensors. Two
expressions have one number exactly when they are written alike, up to these rules, each of which
holds for every value of the leaves, to the bit (NaN, infinities and signs of zero included):

- a register's halves: lo(pair(a, b)) = a, hi(pair(a, b)) = b, pair(lo(x), hi(x)) = x;
- sums, products and bitwise operations of two operands in either order (a NaN that arithmetic makes
  has one pattern);
- max.f32 of a set: it ignores NaN, so order, nesting and repetition do not matter; its constants
  are one constant;
- -inf - m = -inf where m is a maximum with a finite constant among its operands, hence neither NaN
  nor -inf;
- -inf > y is false, and max(s, -inf) > y is max(s) > y;
- 0 * 2^(c - m) = 0 where the maximum m has a finite constant that is c or more, also as the product
  of a fused multiply-add;
- a product of tensor cores of zeros that is added to 0 is 0;
- (x f + 0) f + 0 = x f + 0 where f is 0, 1 or 2^(m - m), which is 1 or NaN;
- x + 0 = x where x is a sum or product of powers of two, hence never -0;
- x * f where f is not 1, else x, is x * f for any computed x;
- a choice by x == y is the other way round the one by x != y, which holds for NaN;
- a choice between equal terms is that term, one between true and false its condition; `any` of
  predicates is one of their set;
- a choice between r and r with other choices on it, each of which takes something else only where
  the first one's condition holds too, is what has the others;
- bitwise functions of 16 bits are tables (halves.py).

And one that holds up to the sign of a zero, in sums that are never divided by and end in an
addition of +0: +0 times an element that is finite adds nothing (`without_hidden` of a product of
tensor cores, `_adds_nothing` where bfloat16 is multiplied by fused multiply-adds).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from emulation.ptx.halves import Halves

CONCRETE = 0  # no term: the register's number counts
MINUS_INFINITY, PLUS_ZERO, ONE = 0xFF800000, 0, 0x3F800000
_COMMUTATIVE = ("add.", "mul.f32", "mul.rn.f32", "and.", "or.", "xor.", "min.")
_LONGEST = 6  # operands that a report shows
_MAX, _ADD = "max.f32", "add.f32"


class Terms:
    """The table of all terms. ``reach[t]`` is the set of leaf classes in t, as bits."""

    def __init__(self) -> None:
        self.nodes: list[tuple] = [("concrete",)]
        self.reach: list[int] = [0]
        self.classes: list[object] = []
        self._class_of: dict[object, int] = {}
        self._number: dict[tuple, int] = {}
        self._made: dict[str, dict[tuple[int, ...], int]] = {}
        self._hidden: dict[tuple, int] = {}
        self._finite: dict[tuple[str, int], bool] = {}
        # Whether the rule that holds up to the sign of a zero was ever used.
        self.drops_zeros = False
        self._unit: set[int] = set()  # from 0 to 1, and no NaN
        self._above: set[int] = set()  # neither NaN nor -inf
        self._plus: set[int] = set()  # results of float arithmetic that are never -0
        self._computed: set[int] = set()  # choices between results of float arithmetic
        self.halves = Halves(self)
        self.constant(0, 16)

    def _intern(self, node: tuple, arguments: Iterable[int], reach: int = 0) -> int:
        found = self._number.get(node)
        if found is None:
            found = self._number[node] = len(self.nodes)
            for argument in arguments:
                reach |= self.reach[argument]
            self.nodes.append(node)
            self.reach.append(reach)
        return found

    def constant(self, bits: int, width: int) -> int:
        return self._intern(("constant", bits, width), ())

    def constants(self, bits: np.ndarray, width: int) -> np.ndarray:
        values, inverse = np.unique(bits, return_inverse=True)
        numbers = [self.constant(int(value), width) for value in values]
        return np.array(numbers, np.int32)[inverse]

    def leaf(self, name: tuple, of_class: object) -> int:
        """An element of a tensor; its class is what `reach` tells apart."""
        bit = self._class_of.setdefault(of_class, len(self.classes))
        if bit == len(self.classes):
            self.classes.append(of_class)
        return self._intern(("leaf", name, of_class), (), 1 << bit)

    def class_bits(self, classes: Iterable[object]) -> int:
        """A set of leaf classes, as `reach` has it; those of no leaf are left out."""
        known = (self._class_of.get(of_class) for of_class in classes)
        return sum(1 << bit for bit in known if bit is not None)

    def apply(self, operation: str, *columns: np.ndarray) -> np.ndarray:
        """The terms of an operation on each row of its operands' columns."""
        made = self._made.setdefault(operation, {})
        result = []
        for arguments in zip(*(column.tolist() for column in columns), strict=True):
            term = made.get(arguments)
            if term is None:
                term = made[arguments] = self._simplified(operation, arguments)
            result.append(term)
        return np.array(result, np.int32)

    def one(self, operation: str, *arguments: int) -> int:
        return int(self.apply(operation, *(np.array([x]) for x in arguments))[0])

    def group(self, operation: str, members: Sequence[int]) -> int:
        """A term of any number of operands, as they are."""
        return self._intern((operation, *members), members)

    def value(self, term: int) -> tuple[int, int] | None:
        """Bits and width of a constant."""
        node = self.nodes[term]
        return node[1:] if node[0] == "constant" else None

    # Rules.

    def _simplified(self, operation: str, arguments: tuple[int, ...]) -> int:
        rule = getattr(self, f"_{operation}", None) if operation.isalpha() else None
        if rule:
            return rule(*arguments)
        if operation == _MAX:
            return self._maximum(arguments)
        values = [self.value(term) for term in arguments]
        if operation.startswith("setp.gt.f32"):
            if values[0] and values[0][0] == MINUS_INFINITY:
                return self.constant(0, 1)
            arguments = (self._without_minus_infinity(arguments[0]), arguments[1])
        is_bottom = bool(values[0]) and values[0][0] == MINUS_INFINITY
        if operation == "sub.f32" and is_bottom and arguments[1] in self._above:
            return self.constant(MINUS_INFINITY, 32)
        if operation == _ADD:
            for value, other in zip(values, arguments[::-1], strict=True):
                if value and value[0] == PLUS_ZERO and other in self._plus:
                    return other
        if (found := self.halves.simplified(operation, arguments)) is not None:
            return found
        if operation.startswith("cvt.rn.") and operation.endswith("f16.f32") and (
            self.value(arguments[0]) == (PLUS_ZERO, 32)
        ):  # fmt: skip
            return self.constant(0, 16)
        if operation == "not.pred":
            return self._not(*arguments)
        if operation == "fma.rn.f32" and self._adds_nothing(*arguments):
            self.drops_zeros = True
            return arguments[2]
        if operation.startswith("mma.") and self._is_nothing(*arguments):
            return arguments[2]
        if operation == "fma.rn.f32":
            if (same := self._joined_again(*arguments)) is not None:
                return same
            arguments = self._as_sum(arguments)
        if operation in ("mul.f32", "fma.rn.f32"):
            for x, y in (arguments[:2], arguments[1::-1]):
                if self.value(x) == (PLUS_ZERO, 32) and y in self._unit:
                    if operation == "mul.f32":
                        return x
                    arguments = (x, x, arguments[2])
        if operation.startswith(_COMMUTATIVE):
            arguments = tuple(sorted(arguments))
        elif operation.startswith("fma."):
            arguments = (*sorted(arguments[:2]), arguments[2])
        term = self._intern((operation, *arguments), arguments)
        if operation.startswith("ex2.") or (
            operation.startswith(("add.f32", "mul.f32", "fma.rn.f32"))
            and all(self._is_plus(x) for x in arguments)
        ):
            self._plus.add(term)
        if operation.startswith("ex2.") and self._is_below_maximum(arguments[0]):
            self._unit.add(term)
        return term

    def _is_below_maximum(self, term: int) -> bool:
        """Whether it is c - m for a number c and a maximum m that a finite number >= c is in."""
        node = self.nodes[term]
        if node[0] != "sub.f32" or not (value := self.value(node[1])) or node[2] not in self._above:
            return False
        number = np.uint32(value[0]).view(np.float32)
        tops = (np.uint32(v[0]).view(np.float32) for x in self._members(node[2])
                if (v := self.value(x)))  # fmt: skip
        return bool(np.isfinite(number)) and any(number <= top < np.inf for top in tops)

    def _adds_nothing(self, x: int, y: int, before: int) -> bool:
        """Whether one of x and y is +0, the other a finite bfloat16, or +0 in a sum of such."""
        if self.value(x) != (PLUS_ZERO, 32):
            x, y = y, x
        if self.value(x) != (PLUS_ZERO, 32):
            return False
        if self.value(y) == (PLUS_ZERO, 32):
            node = self.nodes[before]
            return node[0] == "fma.rn.f32" and all(map(self._is_widened, node[1:3]))
        return self._is_widened(y) and self.is_finite(self.nodes[y][2], "bf16")

    def _is_widened(self, x: int) -> bool:
        """Whether it is a bfloat16 as a float."""
        node = self.nodes[x]
        return node[0] == "pair" and self.value(node[1]) == (0, 16)

    def _as_sum(self, fma: tuple[int, ...]) -> tuple[int, ...]:
        """y f + 0 as 0 * 0 + y f, which is as much where f is 0, 1 or NaN."""
        zero = self.constant(PLUS_ZERO, 32)
        if fma[2] == zero and zero not in fma[:2] and any(map(self._is_idempotent, fma[:2])):
            return zero, zero, self.one("mul.rn.f32", *fma[:2])
        return fma

    def _joined_again(self, *fma: int) -> int | None:
        """y of y f + 0, if y is x f + 0 and f is 0, 1 or NaN."""
        for y, f in itertools.permutations(self._scaled(fma), 2):
            if self.nodes[y][0] == "fma.rn.f32" and f in self._scaled(self.nodes[y][1:]):
                return y if self._is_idempotent(f) else None
        return None

    def _scaled(self, fma: tuple[int, ...]) -> tuple[int, ...]:
        """x and f of x f + 0 and of 0 * 0 + x f."""
        zero = self.constant(PLUS_ZERO, 32)
        if fma[2] == zero:
            return fma[:2]
        node = self.nodes[fma[2]]
        is_sum = fma[:2] == (zero, zero) and node[0] in ("mul.f32", "mul.rn.f32")
        return node[1:] if is_sum else ()

    def _is_idempotent(self, f: int) -> bool:
        """Whether f is 0, 1 or NaN, so that a product with f is not changed by another one."""
        node = self.nodes[f]
        if node[0] == "ite":
            return self._is_idempotent(node[2]) and self._is_idempotent(node[3])
        if node[0].startswith("ex2."):
            kind, *operands = self.nodes[node[1]]
            return kind == "sub.f32" and operands[0] == operands[1]
        return self.value(f) in ((PLUS_ZERO, 32), (ONE, 32))

    def _is_nothing(self, row: int, column: int, before: int) -> bool:
        """Whether all elements of a row of A and a column of B are +0, and that of C is."""
        zero = self.constant(0, 16)
        zeros = all({*self.nodes[vector]} == {"vector", zero} for vector in (row, column))
        return zeros and self.value(before) == (PLUS_ZERO, 32)

    def is_finite(self, x: int, kind: str) -> bool:
        """Whether a 16-bit element is neither NaN nor infinite for all values of its leaves."""
        found = self._finite.get((kind, x))
        if found is None:
            found = self.value(self.halves.not_finite(x, kind)) == (0, 1)
            self._finite[kind, x] = found
        return found

    def without_hidden(self, weights: Sequence[int], elements: Sequence[int], kind: str) -> int:
        """Elements of a product, with 0 for those that are finite and have the weight 0."""
        key = (kind, *(self.value(x) == (0, 16) for x in weights), *elements)
        found = self._hidden.get(key)
        if found is None:
            zero = self.constant(0, 16)
            kept = [
                zero if self.value(w) == (0, 16) and self.is_finite(x, kind) else x
                for w, x in zip(weights, elements, strict=True)
            ]
            self.drops_zeros |= kept != [*elements]
            found = self._hidden[key] = self.group("vector", kept)
        return found

    def _is_plus(self, term: int) -> bool:
        value = self.value(term)
        return term in self._plus or (value is not None and value[0] < 0x80000000)

    def _lo(self, x: int) -> int:
        return self._half("lo", x, 1)

    def _hi(self, x: int) -> int:
        return self._half("hi", x, 2)

    def _half(self, which: str, x: int, place: int) -> int:
        node = self.nodes[x]
        if node[0] == "constant":
            width = node[2] // 2
            bits = node[1] >> width if place == 2 else node[1]
            return self.constant(bits & (1 << width) - 1, width)
        return node[place] if node[0] == "pair" else self._intern((which, x), (x,))

    def _pair(self, low: int, high: int) -> int:
        a, b = self.nodes[low], self.nodes[high]
        if a[0] == "constant" and b[0] == "constant":
            return self.constant(a[1] | b[1] << a[2], a[2] + b[2])
        if a[0] == "lo" and b == ("hi", a[1]):
            return a[1]
        return self._intern(("pair", low, high), (low, high))

    def _members(self, term: int) -> tuple[int, ...]:
        node = self.nodes[term]
        return node[1:] if node[0] == _MAX else (term,)

    def _maximum(self, arguments: Iterable[int]) -> int:
        members = {member for x in arguments for member in self._members(x)}
        known = {x: value[0] for x in members if (value := self.value(x))}
        if known:
            floats = {x: np.uint32(bits).view(np.float32) for x, bits in known.items()}
            if any(np.isnan(x) for x in floats.values()):
                return self.group(_MAX + " with NaN", sorted(members))
            top = max(floats, key=lambda x: (floats[x], known[x] == PLUS_ZERO))
            members = (members - set(known)) | {top}
            if len(members) == 1:
                return top
        if len(members) == 1 and len(tuple(arguments)) > 1:
            # The maximum of a NaN is the one pattern that arithmetic makes.
            return self._intern((_MAX, *members), members)
        term = self._intern((_MAX, *sorted(members)), members)
        if known and np.isfinite(floats[top]):
            self._above.add(term)
        return term

    def _without_minus_infinity(self, term: int) -> int:
        members = self._members(term)
        bottom = self.constant(MINUS_INFINITY, 32)
        if bottom not in members or len(members) == 1:
            return term
        rest = [x for x in members if x != bottom]
        return rest[0] if len(rest) == 1 else self._maximum(rest)

    def _ite(self, condition: int, yes: int, no: int) -> int:
        if yes == no:
            return yes
        if value := self.value(condition):
            return yes if value[0] else no
        if self.nodes[condition][0] == "not":
            return self._ite(self.nodes[condition][1], no, yes)
        if self.nodes[condition][0] == "setp.eq.f32":
            unequal = self.one("setp.neu.f32", *self.nodes[condition][1:])
            return self._ite(unequal, no, yes)
        if self._scales_by_one(condition, yes, no) or self._is_below(condition, yes, no):
            return yes
        if self.value(yes) == (1, 1) and self.value(no) == (0, 1):
            return condition
        term = self._intern(("ite", condition, yes, no), (condition, yes, no))
        for facts in (self._above, self._plus):
            if yes in facts and no in facts:
                facts.add(term)
        if self._is_computed(yes) and self._is_computed(no):
            self._computed.add(term)
        return term

    def _is_below(self, condition: int, yes: int, no: int) -> bool:
        """Whether `yes` is `no` under choices that are made only where the condition holds."""
        implying = self.alternatives(condition)
        while yes != no:
            node = self.nodes[yes]
            if node[0] != "ite" or node[1] not in implying:
                return False
            yes = node[3]
        return True

    def _scales_by_one(self, condition: int, yes: int, no: int) -> bool:
        """Whether yes = no * f and the condition holds wherever f is not 1."""
        kind, *factors = self.nodes[yes]
        if kind != "mul.f32" or no not in factors or not self._is_computed(no):
            return False
        factor = factors[factors[0] == no]
        tested = self.alternatives(condition)
        one = self.constant(ONE, 32)
        return any(self.nodes[x] == ("setp.neu.f32", factor, one) for x in tested)

    def _is_computed(self, term: int) -> bool:
        """Whether float arithmetic made it, which knows one NaN, or it is a constant number."""
        if value := self.value(term):
            return value[0] & 0x7FFFFFFF <= 0x7F800000
        return term in self._computed or self.nodes[term][0].startswith(
            ("mma.", "add.f32", "mul.f32", "fma.rn.f32")
        )

    def _not(self, x: int) -> int:
        node = self.nodes[x]
        if node[0] == "constant":
            return self.constant(1 - node[1], 1)
        return node[1] if node[0] == "not" else self._intern(("not", x), (x,))

    def any(self, predicates: Iterable[int]) -> int:
        members = set()
        for x in predicates:
            node = self.nodes[x]
            members |= set(node[1:]) if node[0] == "any" else {x}
        false, true = self.constant(0, 1), self.constant(1, 1)
        members.discard(false)
        if true in members or not members:
            return true if members else false
        return members.pop() if len(members) == 1 else self.group("any", sorted(members))

    def alternatives(self, condition: int) -> set[int]:
        """Predicates each of which implies the condition."""
        node = self.nodes[condition]
        return set(node[1:]) if node[0] == "any" else {condition}

    # Reports.

    def class_of(self, leaf: int) -> object:
        return self.classes[self.reach[leaf].bit_length() - 1]

    @staticmethod
    def text_of(name: tuple) -> str:
        return " ".join(map(str, name))

    def arguments(self, term: int) -> tuple[int, ...]:
        node = self.nodes[term]
        return () if node[0] in ("constant", "leaf", "concrete") else node[1:]

    def leaves(self, term: int, classes: int) -> list[tuple]:
        """Names of a term's leaves whose class is in a set, in order."""
        found, seen, waiting = [], {term}, [term]
        while waiting:
            at = waiting.pop()
            if self.nodes[at][0] == "leaf":
                found.append(self.nodes[at][1])
            for x in self.arguments(at):
                if x not in seen and self.reach[x] & classes:
                    seen.add(x)
                    waiting.append(x)
        return sorted(found, key=str)

    def text(self, term: int, depth: int = 2) -> str:
        """A term as f(a, b), to a depth."""
        node = self.nodes[term]
        if node[0] == "leaf":
            return f"[{self.text_of(node[1])}]"
        if node[0] == "constant":
            is_float = node[2] == 32
            return f"{np.uint32(node[1]).view(np.float32):g}" if is_float else str(node[1])
        inside = "..."
        if depth:
            more = ", ..." if len(node) > _LONGEST + 1 else ""
            inside = ", ".join(self.text(x, depth - 1) for x in node[1 : _LONGEST + 1]) + more
        return f"{node[0]}({inside})"

    def difference(self, a: int, b: int) -> tuple[int, int]:
        """The first subterms in which two terms of one operation differ."""
        while a != b:
            x, y = self.nodes[a], self.nodes[b]
            if x[0] != y[0] or len(x) != len(y) or x[0] in ("constant", "leaf"):
                break
            # Operands may be in either order: those that the other term lacks.
            left = [p for p in x[1:] if p not in y[1:]] or x[1:]
            right = [q for q in y[1:] if q not in x[1:]] or y[1:]
            if len(left) != len(right):
                left, right = x[1:], y[1:]
            a, b = next((p, q) for p, q in zip(left, right, strict=True) if p != q)
        return a, b
