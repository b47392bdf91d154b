"""Instructions that the lanes of a warp execute together, on terms."""

from __future__ import annotations

import numpy as np

from emulation.ptx.instruction import Instruction
from emulation.ptx.symbolic_memory import SymbolicError
from emulation.ptx.terms import CONCRETE
from emulation.ptx.warp import GROUP, IN_GROUP, registers


class WarpRules:
    """A part of ``SymbolicMachine``."""

    def rule_shfl(self, x: Instruction, mask) -> None:
        """The concrete shuffle of lane numbers says whose term each lane receives."""
        target, source, *rest = x.operands
        if self.has_terms(rest, mask) is not None:
            raise SymbolicError("a shuffle from a lane that data choose")
        active = np.ones(self.count, bool) if mask is None else mask
        lanes = np.flatnonzero(active)
        held = self.term(source, np.arange(self.count), 32)
        register = target.partition("|")[0]
        place = "%lanes of a shuffle"
        self.values[place] = np.arange(self.count, dtype=np.uint32)
        super()._execute(
            Instruction(x.guard, x.opcode, x.name, x.modifiers, (target, place, *rest)), mask
        )
        self.set_terms(register, lanes, held[self.values[register][lanes].astype(np.int64)])

    def rule_vote(self, x: Instruction, mask) -> None:
        target, source, _ = x.operands
        super()._execute(x, mask)
        if x.modifiers[1] != "any":
            raise SymbolicError(f"{x.opcode} of data")
        active = np.ones(self.count, bool) if mask is None else mask
        for warp in np.flatnonzero(active.reshape(-1, 32).any(1)):
            lanes = 32 * warp + np.flatnonzero(active.reshape(-1, 32)[warp])
            terms = self.term(source.lstrip("!"), lanes, 1)
            if source[0] == "!":
                terms = self.table.apply("not", terms)
            self.set_terms(target, lanes, np.full(len(lanes), self.table.any(terms.tolist())))

    def rule_redux(self, x: Instruction, mask) -> None:
        raise SymbolicError(f"{x.opcode} of data")

    def _warps(self, mask) -> np.ndarray:
        """Warps that execute an instruction of all lanes, and their lanes."""
        active = np.ones(self.count, bool) if mask is None else mask
        return np.flatnonzero(active.reshape(-1, 32).all(1))

    def elements(self, operand: str, warps: np.ndarray) -> np.ndarray:
        """Terms of 16-bit elements of a fragment: [warp, lane, element]."""
        lanes = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        parts = [
            self.table.apply(half, self.term(name, lanes, 32))
            for name in registers(operand) for half in ("lo", "hi")
        ]  # fmt: skip
        return np.stack(parts, -1).reshape(len(warps), 32, len(parts))

    def rule_mma(self, x: Instruction, mask) -> None:
        warps = self._warps(mask)
        lanes = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        depth = {"m16n8k8": 8, "m16n8k16": 16}[x.modifiers[2]]
        group, in_group = GROUP[:, None], IN_GROUP[:, None]
        i = np.arange(depth // 2)
        left = np.empty((len(warps), 16, depth), np.int32)
        row = np.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
        left[:, row, in_group * 2 + (i & 1) + np.where(i < 4, 0, 8)] = self.elements(
            x.operands[1], warps
        )
        i = np.arange(depth // 4)
        right = np.empty((len(warps), 8, depth), np.int32)
        right[
            :, np.broadcast_to(group, (32, len(i))), in_group * 2 + (i & 1) + np.where(i < 2, 0, 8)
        ] = self.elements(x.operands[2], warps)
        rows = np.array(
            [[self.table.group("vector", v) for v in m] for m in left.tolist()], np.int32
        )
        columns = self._columns(left, right, x.modifiers[-2])
        before = [self.term(name, lanes, 32) for name in registers(x.operands[3])]
        super()._execute(x, mask)  # the shape, and whether all lanes take part
        for j, name in enumerate(registers(x.operands[0])):
            row, column = (GROUP if j < 2 else GROUP + 8), IN_GROUP * 2 + j % 2
            a, b = rows[:, row].reshape(-1), columns[:, row, column].reshape(-1)
            self.set_terms(name, lanes, self.table.apply(x.opcode, a, b, before[j]))

    def _columns(self, left: np.ndarray, right: np.ndarray, kind: str) -> np.ndarray:
        """Terms of B's columns with each row of A, [warp, 16, 8]: see `without_hidden`."""
        table = self.table
        plain = [[table.group("vector", v) for v in m] for m in right.tolist()]
        columns = np.repeat(np.array(plain, np.int32)[:, None], 16, axis=1)
        elements, inverse = np.unique(right, return_inverse=True)
        finite = np.array([table.is_finite(x, kind) for x in elements.tolist()])
        zero = table.constant(0, 16)
        finite = finite[inverse].reshape(right.shape) & (right != zero)
        if finite.any():
            hidden = left == zero
            for w, i, j in np.argwhere((hidden[:, :, None] & finite[:, None]).any(-1)).tolist():
                columns[w, i, j] = table.without_hidden(
                    left[w, i].tolist(), right[w, j].tolist(), kind
                )
        return columns

    def set_matrix(self, register: str, warps: np.ndarray, matrix: np.ndarray) -> None:
        """Terms of 8x8 matrices to the lanes that have them."""
        lanes = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        low, high = (matrix[:, GROUP, 2 * IN_GROUP + i].reshape(-1) for i in (0, 1))
        self.set_terms(register, lanes, self.table.apply("pair", low, high))

    def rule_movmatrix(self, x: Instruction, mask) -> None:
        warps = self._warps(mask)
        matrix = np.empty((len(warps), 8, 8), np.int32)
        elements = self.elements(x.operands[1], warps)
        matrix[:, GROUP[:, None], 2 * IN_GROUP[:, None] + np.arange(2)] = elements
        super()._execute(x, mask)
        self.set_matrix(x.operands[0], warps, matrix.swapaxes(1, 2))

    def _ldmatrix(self, x: Instruction, mask) -> None:
        super()._execute(x, mask)
        if not self.memory.row_terms.any():
            return
        warps = self._warps(mask)
        terms = self.memory.row_terms
        bare = terms == CONCRETE
        terms[bare] = self.table.constants(self.memory.row_numbers[bare], 16)
        matrices = self._known_finite(terms.reshape(-1, 4, 8, 8)[warps], warps)
        for k, register in enumerate(registers(x.operands[0])):
            matrix = matrices[:, k]
            self.set_matrix(
                register, warps, matrix.swapaxes(1, 2) if "trans" in x.modifiers else matrix
            )

    def _known_finite(self, matrices: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """Elements whose finiteness is why the warp goes this way, spelled as "x, or 0 if not"."""
        facts = [
            fact for frame in self.frames for warp in warps.tolist()
            for fact in frame.false.get(warp, ())
        ]  # fmt: skip
        if not facts:
            return matrices
        for i, warp in enumerate(warps.tolist()):
            false = set().union(*(frame.false.get(warp, ()) for frame in self.frames))
            for term in np.unique(matrices[i]).tolist():
                for kind in ("f16", "bf16"):
                    if self.table.halves.not_finite(term, kind) in false:
                        known = self.table.halves.finite_or_zero(term, kind)
                        matrices[i][matrices[i] == term] = known
        return matrices
