"""The PTX machine on terms: what a kernel computes of data that it does not know.

Registers, shared and global memory hold a term (terms.py) wherever a number comes from data; the
number next to it means nothing then. Indices, addresses and loop counters stay numbers. Where data
choose a way through the code, both ways are taken and what they leave is `ite(condition, a, b)`, up
to the place where they meet again; an address or a loop's end that depends on data is an error.

One element of mma.sync is one opaque term of its row of A, its column of B and its element of C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emulation.ptx import arithmetic
from emulation.ptx.flow import Flow
from emulation.ptx.instruction import Instruction
from emulation.ptx.machine import Machine
from emulation.ptx.symbolic_memory import Frame, Shadow, SymbolicError, SymbolicMemory
from emulation.ptx.symbolic_warp import WarpRules
from emulation.ptx.terms import CONCRETE, Terms
from emulation.ptx.warp import registers

DEEPEST = 12  # branches on data inside of each other


class SymbolicMachine(WarpRules, Machine):
    """One kernel; launches that follow one another share a ``Shadow`` of global memory."""

    def __init__(self, ptx: str, kernel: str, terms: Terms) -> None:
        super().__init__(ptx, kernel)
        self.table = terms
        self.shadow = Shadow(terms)
        self.flow = Flow(self.code, self.labels)
        # Times that each conditional branch was taken, and was not.
        self.branches = {
            at: [0, 0] for at, x in enumerate(self.code) if x.guard and x.name == "bra"
        }
        self.forks: set[int] = set()  # branches that data decided

    def launch(self, *arguments, **named) -> None:
        self.terms: dict[str, np.ndarray] = {}
        self.frames: list[Frame] = []
        super().launch(*arguments, **named)
        self.memory.close()

    def _memory(self, arguments, tensors, blocks: int, shared_bytes: int) -> SymbolicMemory:
        return SymbolicMemory(self, arguments, tensors, blocks, shared_bytes)

    # Registers.

    def width(self, register: str) -> int:
        width = self.widths[register.strip("%0123456789")]
        return 1 if width == "pred" else int(width)

    def save(self, register: str) -> None:
        """Remembers a register before a way of a branch writes it."""
        for frame in self.frames[-1:]:
            if register not in frame.registers:
                old = (self.values.get(register), self.terms.get(register))
                frame.registers[register] = tuple(x if x is None else x.copy() for x in old)

    def set(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        if register == "_":
            return
        self.save(register)
        super().set(register, value, mask)
        if register in self.terms:
            if mask is None:
                del self.terms[register]
            else:
                self.terms[register][mask] = CONCRETE

    def set_terms(self, register: str, lanes: np.ndarray, terms: np.ndarray) -> None:
        """Writes terms; a constant becomes a number."""
        if register == "_":
            return
        mask = np.zeros(self.count, bool)
        mask[lanes] = True
        numbers = np.zeros(self.count, np.uint64)
        terms = np.array(terms, np.int32)
        for term in np.unique(terms).tolist():
            if value := self.table.value(term):
                numbers[lanes[terms == term]] = value[0]
                terms[terms == term] = CONCRETE
        self.set(register, numbers, mask)
        if terms.any():
            if register not in self.terms:
                self.terms[register] = np.zeros(self.count, np.int32)
            self.terms[register][lanes] = terms

    def term(self, operand: str, lanes: np.ndarray, width: int) -> np.ndarray:
        """Terms of an operand, numbers as constants."""
        held = self.terms.get(operand)
        terms = np.zeros(len(lanes), np.int32) if held is None else held[lanes]
        bare = terms == CONCRETE
        if bare.any():
            bits = self.bits(operand) if width == 1 else self.get(operand, f"b{width}")
            bits = np.broadcast_to(bits, self.count)[lanes]
            terms[bare] = self.table.constants(bits[bare], width)
        return terms

    def has_terms(self, operands: Sequence[str], mask: np.ndarray | None) -> np.ndarray | None:
        """Lanes in which one of the operands is a term, or None."""
        found = None
        for operand in operands:
            held = self.terms.get(operand)
            if held is not None:
                found = held != CONCRETE if found is None else found | (held != CONCRETE)
        if found is None:
            return None
        found = found if mask is None else found & mask
        return found if found.any() else None

    # Branches.

    def _branch(self, x: Instruction, pc: np.ndarray, mask, active, following: int) -> None:
        at = following - 1
        if not x.guard:
            super()._branch(x, pc, mask, active, following)
            return
        of_data = self.has_terms([x.guard.lstrip("!")], mask)
        decided = mask if of_data is None else mask & ~of_data
        taken = active & decided
        pc[decided] = following
        pc[taken] = self.labels[x.operands[0]]
        self.branches[at][0] += int(taken.any())
        self.branches[at][1] += int((decided & ~taken).any())
        if of_data is not None:
            self._both_ways(x, at, of_data)
            pc[of_data] = self.flow.meeting(at)

    def _both_ways(self, x: Instruction, at: int, mask: np.ndarray) -> None:
        if len(self.frames) >= DEEPEST:
            raise SymbolicError(
                f"a loop's end depends on data: {x.guard} {x.opcode} {x.operands[0]}"
            )
        meeting, end = self.flow.meeting(at), len(self.code)
        if name := self.flow.barrier_before(at, meeting):
            raise SymbolicError(f"{name} where data have chosen the way")
        self.forks.add(at)
        self.branches[at] = [n + 1 for n in self.branches[at]]
        lanes = np.flatnonzero(mask)
        condition = self.term(x.guard.lstrip("!"), lanes, 1)
        if x.guard[0] == "!":
            condition = self.table.apply("not", condition)
        ways = []
        for start in (self.labels[x.operands[0]], at + 1):
            # The predicate that is false on this side: the condition or its contrary.
            fails = condition if start == at + 1 else self.table.apply("not", condition)
            frame = Frame(false=self._false_in_warps(lanes, fails))
            self.frames.append(frame)
            self._run(np.where(mask, start, end), meeting)
            self.frames.pop()
            left = {name: self._pair_of(name, lanes) for name in frame.registers}
            memory = self.memory.undo(frame)
            for name, (value, terms) in frame.registers.items():
                for kept, old in ((self.values, value), (self.terms, terms)):
                    if old is None:
                        kept.pop(name, None)
                    else:
                        kept[name] = old
            ways.append((left, memory))
        (yes, yes_memory), (no, no_memory) = ways
        for name in yes.keys() | no.keys():
            a, b = (way.get(name) or self._pair_of(name, lanes) for way in (yes, no))
            self._join(name, lanes, condition, a, b)
        self.memory.join(yes_memory, no_memory, dict(zip(lanes.tolist(), condition, strict=True)))

    def _false_in_warps(self, lanes: np.ndarray, condition: np.ndarray) -> dict[int, set[int]]:
        """Predicates of which each warp knows that they do not hold where a condition does not."""
        false = {}
        for warp in np.unique(lanes // 32).tolist():
            of_warp = condition[lanes // 32 == warp]
            if len(of_warp) == 32 and (of_warp == of_warp[0]).all():
                false[warp] = self.table.alternatives(int(of_warp[0]))
        return false

    def _pair_of(self, register: str, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers and terms of a register, zeros where it was not written."""
        value, terms = self.values.get(register), self.terms.get(register)
        width = self.width(register)
        kind = bool if width == 1 else f"u{width // 8}"
        return (
            np.zeros(len(lanes), kind) if value is None else value[lanes],
            np.zeros(len(lanes), np.int32) if terms is None else terms[lanes],
        )

    def _join(self, register: str, lanes, condition, yes, no) -> None:
        width = self.width(register)
        terms = []
        for value, held in (yes, no):
            bare = held == CONCRETE
            held[bare] = self.table.constants(value[bare], width)
            terms.append(held)
        self.set_terms(register, lanes, self.table.apply("ite", condition, *terms))

    # Instructions.

    def _execute(self, x: Instruction, mask: np.ndarray | None) -> None:
        if x.guard and self.has_terms([x.guard.lstrip("!")], None) is not None:
            raise SymbolicError(f"{x.opcode} guarded by data")
        if x.name in ("ld", "st", "cp"):
            super()._execute(x, mask)
            return
        if x.name == "ldmatrix":
            self._ldmatrix(x, mask)
            return
        target, *sources = x.operands if x.operands else ("",)
        inputs = [name for operand in sources for name in registers(operand.lstrip("!"))]
        found = self.has_terms(inputs, mask)
        if found is None:
            super()._execute(x, mask)
            return
        rule = getattr(self, f"rule_{x.name}", None)
        if x.name in ("mma", "movmatrix", "shfl", "vote", "redux"):
            rule(x, mask)
            return
        lanes = np.flatnonzero(found)
        if x.name == "mov" and "{" in target:
            results = self._unpacked(x, lanes)
        else:
            results = [(target, rule(x, lanes) if rule else self._opaque(x, lanes))]
        if mask is None or (found != mask).any():
            super()._execute(x, mask)  # for the lanes without a term
        for register, terms in results:
            self.set_terms(register, lanes, terms)

    def _opaque(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        """f(operands) for an instruction f that no rule takes apart."""
        if x.kind == "pred":
            widths = [1] * len(x.operands)
        elif x.kind not in arithmetic.TYPES and x.kind not in ("bf16", "bf16x2"):
            raise SymbolicError(f"no rule for {x.opcode} of data")
        else:
            bits = {"bf16": 16, "bf16x2": 32}.get(x.kind) or 8 * arithmetic.TYPES[x.kind].itemsize
            widths = [bits] * len(x.operands)
            if x.name in ("shl", "shr"):
                widths[2] = 32
            if x.name == "mad" and x.modifiers[0] == "wide":
                widths[3] = 2 * bits
        operands = [
            self.term(operand, lanes, width)
            for operand, width in zip(x.operands[1:], widths[1:], strict=True)
        ]
        return self.table.apply(x.opcode, *operands)

    def rule_mov(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        source = x.operands[1]
        if "{" not in source:
            return self.term(source, lanes, self.width(x.operands[0]))
        names = registers(source)
        width = self.width(x.operands[0]) // len(names)
        parts = [self.term(name, lanes, width) for name in names]
        while len(parts) > 1:
            parts = [self.table.apply("pair", *parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return parts[0]

    rule_cvta = rule_mov

    def _unpacked(self, x: Instruction, lanes: np.ndarray) -> list[tuple[str, np.ndarray]]:
        names = registers(x.operands[0])
        parts = [self.term(x.operands[1], lanes, int(x.kind[1:]))]
        while len(parts) < len(names):
            parts = [self.table.apply(half, part) for part in parts for half in ("lo", "hi")]
        return list(zip(names, parts, strict=True))

    def rule_selp(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        width = self.width(x.operands[0])
        yes, no = (self.term(operand, lanes, width) for operand in x.operands[1:3])
        return self.table.apply("ite", self.term(x.operands[3], lanes, 1), yes, no)

    def rule_and(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        if x.kind == "pred":
            a, b = (self.term(operand, lanes, 1) for operand in x.operands[1:])
            return self.table.apply("ite", a, b, self.table.constants(np.zeros(len(a)), 1))
        return self._opaque(x, lanes)

    def rule_or(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        if x.kind == "pred":
            terms = [self.term(operand, lanes, 1).tolist() for operand in x.operands[1:]]
            both = zip(*terms, strict=True)
            return np.array([self.table.any(pair) for pair in both], np.int32)
        return self._opaque(x, lanes)

    def _shift(self, x: Instruction, lanes: np.ndarray, low: bool) -> np.ndarray:
        amount = np.broadcast_to(self.get(x.operands[2], "u32"), self.count)[lanes]
        if x.kind[1:] != "32" or x.kind[0] == "s" or (amount != 16).any():
            return self._opaque(x, lanes)
        value = self.term(x.operands[1], lanes, 32)
        zero = self.table.constants(np.zeros(len(lanes)), 16)
        if low:
            return self.table.apply("pair", zero, self.table.apply("lo", value))
        return self.table.apply("pair", self.table.apply("hi", value), zero)

    def rule_shl(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        return self._shift(x, lanes, True)

    def rule_shr(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        return self._shift(x, lanes, False)

    def rule_prmt(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        selectors = np.broadcast_to(self.get(x.operands[3], "b32"), self.count)[lanes]
        choices = [int(selectors[0]) >> 4 * i & 15 for i in range(4)]
        if (
            (selectors != selectors[0]).any()
            or any(choice > 7 for choice in choices)
            or any(choices[i] % 2 or choices[i + 1] != choices[i] + 1 for i in (0, 2))
        ):
            raise SymbolicError(f"{x.opcode} that does not move whole halves")
        parts = [self.term(operand, lanes, 32) for operand in x.operands[1:3]]
        halves = [self.table.apply(half, part) for part in parts for half in ("lo", "hi")]
        return self.table.apply("pair", halves[choices[0] // 2], halves[choices[2] // 2])

    def rule_cvt(self, x: Instruction, lanes: np.ndarray) -> np.ndarray:
        to, source = x.modifiers[-2:]
        if to[0] in "ub" and source[0] in "ub" and to[1:].isdigit() and source[1:].isdigit():
            value, at = self.term(x.operands[1], lanes, int(source[1:])), int(source[1:])
            while at > int(to[1:]):
                value, at = self.table.apply("lo", value), at // 2
            while at < int(to[1:]):
                zero = self.table.constants(np.zeros(len(lanes)), at)
                value, at = self.table.apply("pair", value, zero), 2 * at
            return value
        bits = 16 if source == "bf16" else 8 * arithmetic.TYPES[source].itemsize
        values = [self.term(operand, lanes, bits) for operand in x.operands[1:]]
        if to.endswith("x2"):
            opcode = x.opcode.replace("x2", "")
            high, low = (self.table.apply(opcode, value) for value in values)
            return self.table.apply("pair", low, high)
        return self.table.apply(x.opcode, *values)
