"""Memory of the machine on terms: a term for every two bytes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from emulation.ptx.arithmetic import TYPES
from emulation.ptx.instruction import Instruction
from emulation.ptx.memory import Memory
from emulation.ptx.terms import CONCRETE, Terms
from emulation.ptx.warp import registers


class SymbolicError(Exception):
    """Something that the statements do not allow, or this machine cannot follow."""


@dataclasses.dataclass
class Written:
    """The writes of one side of a branch to one space: numbers, terms of two bytes, and by whom."""

    numbers: np.ndarray
    terms: np.ndarray
    by: dict[int, int]  # place -> thread


@dataclasses.dataclass
class Frame:
    """Changes that are undone after one side of a branch."""

    registers: dict[str, tuple] = dataclasses.field(default_factory=dict)
    spaces: dict[str, Written] = dataclasses.field(default_factory=dict)
    # Predicates that do not hold on this side, by warp.
    false: dict[int, set[int]] = dataclasses.field(default_factory=dict)


class Shadow:
    """Terms of the tensors' storages, kept from one launch to the next."""

    def __init__(self, terms: Terms) -> None:
        self.table = terms
        self.storages: dict[int, np.ndarray] = {}
        self.reads: set[int] = set()  # terms that were loaded

    def of(self, x: torch.Tensor) -> np.ndarray:
        """Terms of a tensor's storage; without any, it holds numbers."""
        storage = x.untyped_storage()
        count = (storage.nbytes() + 1) // 2
        return self.storages.setdefault(storage.data_ptr(), np.zeros(count, np.int32))


class SymbolicMemory(Memory):
    def __init__(self, machine, arguments, tensors, blocks: int, shared_bytes: int) -> None:
        super().__init__(machine, arguments, tensors, blocks, shared_bytes)
        self.table = machine.table
        self.shadow = machine.shadow
        storages = {x.untyped_storage().data_ptr(): self.shadow.of(x) for x in tensors}
        parts = [storages[int(start)] for start in self.starts]
        self.places = np.cumsum([0, *(len(part) for part in parts)])
        nothing = self.table.leaf(("shared memory that nobody has written",), "unwritten")
        self.terms = {
            "global": np.concatenate(parts),
            "shared": np.full(len(self.shared) // 2, nothing, np.int32),
        }
        self.last = np.zeros(0, np.int64)

    def close(self) -> None:
        """Gives what the launch wrote back to the shadow."""
        for start, first, last in zip(self.starts, self.places, self.places[1:], strict=False):
            self.shadow.storages[int(start)] = self.terms["global"][first:last].copy()

    def _no_data(self, operand: str, mask: np.ndarray) -> None:
        of_data = self.machine.terms.get(operand.strip("[]").partition("+")[0])
        if of_data is not None and of_data[mask].any():
            raise SymbolicError(f"an address depends on data: {operand}")

    def _global(self, operand: str, mask: np.ndarray, width: int) -> np.ndarray:
        self._no_data(operand, mask)
        index = super()._global(operand, mask, width)
        address = index + self.base
        region = np.searchsorted(self.starts, address, side="right") - 1
        self.last = self.places[region] + (address - self.starts[region]) // 2
        return index

    def _shared(self, operand: str, mask: np.ndarray, width: int) -> np.ndarray:
        self._no_data(operand, mask)
        index = super()._shared(operand, mask, width)
        self.last = index // 2
        return index

    def _numbers(self, space: str) -> np.ndarray:
        return (self.bytes if space == "global" else self.shared).view(np.uint16)

    def _number_places(self, space: str, places: np.ndarray) -> np.ndarray:
        """The indices in `_numbers` of the two bytes at each place."""
        if space == "shared":
            return places
        region = np.searchsorted(self.places, places, side="right") - 1
        return (self.starts[region] - self.base) // 2 + places - self.places[region]

    def execute(self, x: Instruction, mask: np.ndarray | None) -> None:
        space = next((m for m in x.modifiers if m in ("param", "shared", "global")), None)
        if x.name == "cp" or space == "param":
            super().execute(x, mask)
            return
        machine = self.machine
        lanes = np.arange(machine.count) if mask is None else np.flatnonzero(mask)
        place, data = (1, 0) if x.name == "ld" else (0, 1)
        names, size = registers(x.operands[data]), TYPES[x.kind].itemsize
        terms = self.terms[space]
        if x.name == "st":
            # Computed before the store, saved before it, written after it.
            held = [self._split(name, lanes, 8 * size) for name in names]
            halves = None if all(part is None for part in held) else held
            self._find(x.operands[place], lanes, size * len(names), space)
            where = self.last[:, None] + np.arange(max(1, size // 2) * len(names))
            self._save(space, where, lanes)
            super().execute(x, mask)
            if size < 2:
                if terms[self.last].any() or halves is not None:
                    raise NotImplementedError(f"{x.opcode} of data")
                return
            columns = [
                part if part is not None else np.zeros((len(lanes), size // 2), np.int32)
                for part in held
            ]
            terms[where] = np.concatenate(columns, 1)
            return
        super().execute(x, mask)
        words = max(1, size // 2)
        where = self.last[:, None] + np.arange(words * len(names))
        found = terms[where]
        if not found.any():
            return
        if size < 2:
            raise NotImplementedError(f"{x.opcode} of data")
        if space == "global":
            self.shadow.reads.update(np.unique(found).tolist())
        numbers = self._numbers(space)
        for i, register in enumerate(names):
            parts = found[:, i * words : (i + 1) * words]
            some = parts.any(1)
            if not some.any():
                continue
            columns = []
            for k in range(words):
                column = parts[some, k].copy()
                bare = column == CONCRETE
                if bare.any():
                    places = self._number_places(space, where[some, i * words + k][bare])
                    column[bare] = self.table.constants(numbers[places], 16)
                columns.append(column)
            while len(columns) > 1:
                columns = [
                    self.table.apply("pair", *columns[k : k + 2]) for k in range(0, len(columns), 2)
                ]
            width = machine.width(register)
            while 8 * size < width:
                zero = self.table.constants(np.zeros(len(columns[0])), 8 * size)
                columns, size = [self.table.apply("pair", columns[0], zero)], 2 * size
            machine.set_terms(register, lanes[some], columns[0])

    def _find(self, operand: str, lanes: np.ndarray, width: int, space: str) -> None:
        mask = np.zeros(self.machine.count, bool)
        mask[lanes] = True
        counted = self.machine.sectors, self.machine.wavefronts, self.machine.ideal_wavefronts
        (self._global if space == "global" else self._shared)(operand, mask, width)
        self.machine.sectors, self.machine.wavefronts, self.machine.ideal_wavefronts = counted

    def _split(self, register: str, lanes: np.ndarray, width: int) -> np.ndarray | None:
        """A register's terms as two bytes each, 0 for numbers; None when all are numbers."""
        held = self.machine.terms.get(register)
        if held is None or not held[lanes].any():
            return None
        if width < 16:
            return held[lanes][:, None]
        some = held[lanes] != CONCRETE
        parts = [self.machine.term(register, lanes[some], max(width, self.machine.width(register)))]
        at = max(width, self.machine.width(register))
        while at > width:
            parts, at = [self.table.apply("lo", parts[0])], at // 2
        while at > 16:
            parts = [self.table.apply(half, part) for part in parts for half in ("lo", "hi")]
            at //= 2
        result = np.zeros((len(lanes), len(parts)), np.int32)
        for k, part in enumerate(parts):
            result[some, k] = part
        return result

    # Ways of a branch.

    def _save(self, space: str, where: np.ndarray, lanes: np.ndarray) -> None:
        for frame in self.machine.frames[-1:]:
            kept = frame.spaces.get(space)
            if kept is None:
                kept = frame.spaces[space] = Written(
                    self._numbers(space).copy(), self.terms[space].copy(), {}
                )
            for places, lane in zip(where.tolist(), lanes.tolist(), strict=True):
                kept.by |= dict.fromkeys(places, lane)

    def undo(self, frame: Frame) -> dict[str, Written]:
        """Puts memory back as it was before a way; gives what the way left."""
        left = {}
        for space, kept in frame.spaces.items():
            left[space] = Written(
                self._numbers(space).copy(), self.terms[space].copy(), dict(kept.by)
            )
            self._numbers(space)[:] = kept.numbers
            self.terms[space][:] = kept.terms
        return left

    def join(self, yes: dict[str, Written], no: dict[str, Written], conditions: dict) -> None:
        for space in yes.keys() | no.keys():
            ways = [way.get(space) for way in (yes, no)]
            by = {p: lane for way in ways if way for p, lane in way.by.items()}
            if not by:
                continue
            places = np.array(list(by), np.int64)
            index = self._number_places(space, places)
            lanes = np.array(list(by.values()))
            self._save(space, places[:, None], lanes)
            columns = []
            for way in ways:
                terms = (way.terms if way else self.terms[space])[places].copy()
                numbers = (way.numbers if way else self._numbers(space))[index]
                bare = terms == CONCRETE
                terms[bare] = self.table.constants(numbers[bare], 16)
                columns.append(terms)
            condition = np.array([conditions[lane] for lane in by.values()], np.int32)
            joined = self.table.apply("ite", condition, *columns)
            for term in np.unique(joined).tolist():
                if value := self.table.value(term):
                    self._numbers(space)[index[joined == term]] = value[0]
                    joined[joined == term] = CONCRETE
            self.terms[space][places] = joined

    # Rows of matrices, and copies that arrive late.

    def shared_rows(self, operand: str, mask: np.ndarray) -> np.ndarray:
        rows = self.row_numbers = super().shared_rows(operand, mask)
        self.row_terms = np.zeros((self.machine.count, 8), np.int32)
        self.row_terms[mask] = self.terms["shared"][self.last[:, None] + np.arange(8)]
        return rows

    def _copy_async(self, x: Instruction, mask: np.ndarray | None) -> None:
        count = len(self.copies)
        super()._copy_async(x, mask)
        if len(self.copies) > count and x.operands[0] != x.operands[-1]:
            start = self.copies[-1][3]
            place = np.full(len(start), -1)
            loads = start >= 0
            if loads.any():
                address = start[loads] + self.base
                region = np.searchsorted(self.starts, address, side="right") - 1
                place[loads] = self.places[region] + (address - self.starts[region]) // 2
                found = self.terms["global"][place[loads][:, None] + np.arange(8)]
                self.shadow.reads.update(np.unique(found).tolist())
            self.copies[-1] = (*self.copies[-1], place)

    def _arrive(self, active: np.ndarray, left: int) -> None:
        places = [copy[4] for copy in self.copies]
        for (pending, group, to, _), place in zip(
            (copy[:4] for copy in self.copies), places, strict=True
        ):
            done = pending & active & (group < self.groups - left)
            rows = np.where(
                place[done, None] < 0, CONCRETE,
                self.terms["global"][np.maximum(place[done], 0)[:, None] + np.arange(8)],
            )  # fmt: skip
            self.terms["shared"][to[done, None] // 2 + np.arange(8)] = rows
        super()._arrive(active, left)
