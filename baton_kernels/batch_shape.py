"""Bookkeeping of a running batch: which slot holds how many tokens, and in which columns.

Host integers only, no keys and no tensors. Every method checks all of its arguments before it
changes anything, so a call that raises leaves the shape as it was.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, SupportsIndex

import torch

# Columns and slots go to the ops as int32.
_MAX_INDEX = 2**31 - 1


class ShapeTensors(NamedTuple):
    """Rows in the form that the ops take: arguments of `ragged_attention`, by name."""

    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor


@dataclass(frozen=True)
class Moves:
    """The relocations that bring keys and values in line with a changed shape.

    Columns `[source_starts[i], source_starts[i] + lengths[i])` of slot `source_slots[i]` go to
    columns `[target_starts[i], target_starts[i] + lengths[i])` of slot `target_slots[i]`, for
    all i: the arguments of `move_kv`. Rows without tokens are left out; `bool(moves)` is False
    when nothing has to move.

    Args:
        source_slots: ints, one per move, like all of these.
        source_starts: ints, in columns.
        target_slots: ints.
        target_starts: ints, in columns.
        lengths: ints, in columns, each at least 1.
    """

    source_slots: tuple[int, ...] = ()
    source_starts: tuple[int, ...] = ()
    target_slots: tuple[int, ...] = ()
    target_starts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lengths)


class BatchShape:
    """For every row of a batch: its slot, its start and its length.

    A row occupies the columns `[start, start + length)` of its slot, all other columns are
    padding. In a ragged shape `start = 0` and rows end anywhere; in an aligned shape
    `start = width - length`, so that all rows end in column `width`. Five tokens a-e in slot 0
    and three tokens x-z in slot 2, then seven more tokens p-v allocated in slot 1:

        aligned, width 5            ragged, width 5
        column   0 1 2 3 4 5 6 7    column   0 1 2 3 4 5 6 7
        slot 0   a b c d e . . .    slot 0   a b c d e . . .
        slot 1   . . . . . . . .    slot 1   . . . . . . . .
        slot 2   . . x y z . . .    slot 2   x y z . . . . .

        aligned, width 7            ragged, width 7
        column   0 1 2 3 4 5 6 7    column   0 1 2 3 4 5 6 7
        slot 0   . . a b c d e .    slot 0   a b c d e . . .
        slot 1   p q r s t u v .    slot 1   p q r s t u v .
        slot 2   . . . . x y z .    slot 2   x y z . . . . .

    On the left, slots 0 and 2 moved right by 2 columns (the returned `Moves`) and padding grew by
    4 columns; on the right nothing ever moves. A row may hold no token: in an aligned shape it then
    sits at `start = width` and follows the width.

    Args:
        num_slots: int, at least 1; rows the batch can hold.
        capacity: int, at least 1; columns of a slot.
        aligned: bool; whether all rows end in the same column.

    Raises:
        TypeError: num_slots or capacity is not an integer.
        ValueError: num_slots or capacity is below 1 or does not fit int32.

    Source: BATON, shaping of a newly inserted query and the running batch, for the aligned shape.
    """

    __slots__ = ("_aligned", "_aligned_width", "_capacity", "_lengths", "_num_slots")

    def __init__(self, num_slots: int, capacity: int, *, aligned: bool = False) -> None:
        self._num_slots = checked_int("BatchShape", "num_slots", num_slots, 1, _MAX_INDEX)
        self._capacity = checked_int("BatchShape", "capacity", capacity, 1, _MAX_INDEX)
        self._aligned = bool(aligned)
        # Slot -> length of the rows in use. Starts follow from the lengths and the width, so the
        # two cannot disagree.
        self._lengths: dict[int, int] = {}
        self._aligned_width = 0

    @property
    def num_slots(self) -> int:
        """Rows the batch can hold."""
        return self._num_slots

    @property
    def capacity(self) -> int:
        """Columns of a slot."""
        return self._capacity

    @property
    def aligned(self) -> bool:
        """Whether all rows end in the same column."""
        return self._aligned

    @property
    def width(self) -> int:
        """Aligned: the column where every row ends. Ragged: the largest end in use, or 0."""
        return self._aligned_width if self._aligned else max(self._lengths.values(), default=0)

    @property
    def used(self) -> tuple[int, ...]:
        """The slots in use, ascending."""
        return tuple(sorted(self._lengths))

    @property
    def num_free(self) -> int:
        """Number of slots not in use."""
        return self._num_slots - len(self._lengths)

    def start(self, slot: int) -> int:
        """First column of the row in `slot`, which must be in use (else ValueError)."""
        return self._start(self._used_slot("start", slot))

    def length(self, slot: int) -> int:
        """Number of tokens of the row in `slot`, which must be in use (else ValueError)."""
        return self._lengths[self._used_slot("length", slot)]

    def end(self, slot: int) -> int:
        """`start + length` of the row in `slot`, which must be in use (else ValueError)."""
        slot = self._used_slot("end", slot)
        return self._start(slot) + self._lengths[slot]

    def allocate(self, length: int, slot: int | None = None) -> tuple[int, Moves]:
        """Takes a free slot for a row of `length` tokens.

        Ragged: the row starts in column 0. Aligned: it ends in column `width`; when
        `length > width`, the width becomes `length` and all running rows move right by the
        difference. The moves never touch the new row's slot, so its tokens may be written before
        them or after them.

        Args:
            length: int, 0 to capacity, in tokens. 0 makes an empty row, to be extended later.
            slot: int, the free slot to take; None takes the lowest.

        Returns:
            The slot taken, and the moves to perform.

        Raises:
            TypeError: length or slot is not an integer.
            ValueError: length is out of range, slot is out of range or in use, or no slot is free.

        Source: BATON, shaping of an inserted query against the running batch.
        """
        length = checked_int("BatchShape.allocate", "length", length, 0, self._capacity)
        slot = self._free_slot(slot)
        moves = Moves()
        if self._aligned and length > self._aligned_width:
            moves = self._shift(length - self._aligned_width)
        self._lengths[slot] = length
        return slot, moves

    def extend(self, slots: Iterable[int], counts: Iterable[int] | None = None) -> Moves:
        """Adds tokens at the end of rows: `length += counts[i]` for row `slots[i]`.

        The new tokens of a row are its columns `[end - counts[i], end)` after the call. Aligned:
        all rows end together, so `slots` must hold every row that has tokens, and the counts must
        be equal. A row without tokens may be left out: it stays empty and follows the width. When
        the width would pass the capacity, all rows first move left by the padding common to them;
        those moves have to be done before the new tokens are written.

        Args:
            slots: ints, distinct, in use.
            counts: ints, at least 0, in tokens, one per slot; None stands for 1 each.

        Returns:
            The moves to perform, none in a ragged shape.

        Raises:
            TypeError: a slot or a count is not an integer.
            ValueError: a slot is not in use or named twice, counts do not fit the slots, a row
                would pass the capacity, or an aligned shape would no longer be one.

        Source: BATON, one decode step of the shaped batch; the shift left is the compaction that a
        fixed slab needs.
        """
        slots = [self._used_slot("extend", slot) for slot in slots]
        if counts is None:
            counts = [1] * len(slots)
        else:
            counts = [checked_int("BatchShape.extend", "counts", count, 0) for count in counts]
        if len(counts) != len(slots):
            raise ValueError(
                f"BatchShape.extend: counts must be one per slot ({len(slots)}), got {len(counts)}"
            )
        if len(set(slots)) != len(slots):
            raise ValueError(f"BatchShape.extend: slots must be distinct, got {slots}")
        moves = self._extend_width(slots, counts) if self._aligned else Moves()
        lengths = [self._lengths[slot] + count for slot, count in zip(slots, counts, strict=True)]
        if not self._aligned and max(lengths, default=0) > self._capacity:
            raise ValueError(
                f"BatchShape.extend: counts must be within the capacity {self._capacity}, "
                f"got rows of {lengths} tokens"
            )
        self._lengths.update(zip(slots, lengths, strict=True))
        return moves

    def free(self, slot: int) -> None:
        """Forgets the row in `slot`.

        Aligned: the width stays, except that it falls to 0 when the last row leaves; `trim`
        takes back columns.

        Args:
            slot: int, a slot in use.

        Raises:
            ValueError: slot is not in use.
        """
        del self._lengths[self._used_slot("free", slot)]
        if not self._lengths:
            self._aligned_width = 0

    def trim(self) -> Moves:
        """Drops the padding common to all rows.

        Aligned: all rows move left by the smallest start, so that the width becomes the longest
        length. Ragged: nothing to do.

        Returns:
            The moves to perform.

        Source: BATON, removal: columns that are padding in all surviving rows are dropped.
        """
        if not self._aligned:
            return Moves()
        return self._shift(-self._common_padding())

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots; every row keeps its slot.

        Args:
            num_slots: int, more than the highest slot in use.

        Raises:
            TypeError: num_slots is not an integer.
            ValueError: num_slots is below 1, or a slot in use would be dropped.

        Source: BATON, flexible batch sizes.
        """
        num_slots = checked_int("BatchShape.resize", "num_slots", num_slots, 1, _MAX_INDEX)
        least = max(self._lengths, default=0) + 1
        if num_slots < least:
            raise ValueError(
                f"BatchShape.resize: num_slots must be at least {least} to keep every slot in use, "
                f"got {num_slots}"
            )
        self._num_slots = num_slots

    def tensors(self, slots: Iterable[int], device: torch.device | str = "cpu") -> ShapeTensors:
        """Slots, starts and lengths of rows in the form that the ops take.

        Args:
            slots: ints, in use, in the order of the result's rows.
            device: where to create the tensors.

        Returns:
            slots, starts, lengths: int32 `[rows]` each, contiguous, by name or unpacked.

        Raises:
            ValueError: a slot is not in use.
        """
        slots = [self._used_slot("tensors", slot) for slot in slots]
        starts = [self._start(slot) for slot in slots]
        lengths = [self._lengths[slot] for slot in slots]
        # One tensor and three views of its rows, so that one copy to a device replaces three.
        packed = torch.tensor([slots, starts, lengths], dtype=torch.int32, device=device)
        return ShapeTensors(*packed.unbind())

    def copy(self) -> BatchShape:
        """An independent shape with the same rows."""
        other = BatchShape(self._num_slots, self._capacity, aligned=self._aligned)
        other.assign(self)
        return other

    def assign(self, other: BatchShape) -> None:
        """Becomes equal to `other`, e.g. to adopt a change that was tried out on a copy.

        Args:
            other: BatchShape, not changed and not shared.
        """
        self._num_slots, self._capacity = other._num_slots, other._capacity
        self._aligned, self._aligned_width = other._aligned, other._aligned_width
        self._lengths = dict(other._lengths)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BatchShape):
            return NotImplemented
        return self._state() == other._state()

    # Not hashable, because a shape changes.
    __hash__ = None  # type: ignore[assignment]  # the documented way to say so

    def __repr__(self) -> str:
        rows = ", ".join(f"{slot}: [{self.start(slot)}, {self.end(slot)})" for slot in self.used)
        return (
            f"BatchShape(num_slots={self._num_slots}, capacity={self._capacity}, "
            f"aligned={self._aligned}, width={self.width}, rows={{{rows}}})"
        )

    def _state(self) -> tuple:
        sizes = (self._num_slots, self._capacity)
        return (*sizes, self._aligned, self._aligned_width, self._lengths)

    def _start(self, slot: int) -> int:
        return self._aligned_width - self._lengths[slot] if self._aligned else 0

    def _common_padding(self) -> int:
        return self._aligned_width - max(self._lengths.values(), default=0)

    def _shift(self, columns: int) -> Moves:
        """Adds `columns` to the width and to the start of every row."""
        self._aligned_width += columns
        rows = [slot for slot in sorted(self._lengths) if self._lengths[slot] > 0]
        if columns == 0 or not rows:
            return Moves()
        targets = tuple(self._start(slot) for slot in rows)
        return Moves(
            source_slots=tuple(rows),
            source_starts=tuple(target - columns for target in targets),
            target_slots=tuple(rows),
            target_starts=targets,
            lengths=tuple(self._lengths[slot] for slot in rows),
        )

    def _extend_width(self, slots: list[int], counts: list[int]) -> Moves:
        """Widens an aligned shape by the common count; the caller updates the lengths."""
        missing = sorted({slot for slot, n in self._lengths.items() if n > 0}.difference(slots))
        if missing:
            raise ValueError(
                "BatchShape.extend: slots must be all rows with tokens of an aligned shape, "
                f"got {slots} without {missing}"
            )
        if len(set(counts)) > 1:
            raise ValueError(
                f"BatchShape.extend: counts must be equal in an aligned shape, got {counts}"
            )
        count = counts[0] if counts else 0
        moves = Moves()
        if self._aligned_width + count > self._capacity:
            padding = self._common_padding()
            room = self._capacity - (self._aligned_width - padding)
            if count > room:
                raise ValueError(
                    f"BatchShape.extend: counts must be at most {room} within the capacity "
                    f"{self._capacity}, got {count}"
                )
            moves = self._shift(-padding)
        self._aligned_width += count
        return moves

    def _used_slot(self, method: str, slot: int) -> int:
        slot = checked_int(f"BatchShape.{method}", "slot", slot)
        if slot not in self._lengths:
            raise ValueError(f"BatchShape.{method}: slot must be in use, got {slot}")
        return slot

    def _free_slot(self, slot: int | None) -> int:
        if slot is None:
            slot = next((i for i in range(self._num_slots) if i not in self._lengths), None)
            if slot is None:
                raise ValueError(
                    "BatchShape.allocate: num_slots must be more than the rows in use to take one "
                    f"more, got {self._num_slots}"
                )
            return slot
        slot = checked_int("BatchShape.allocate", "slot", slot, 0, self._num_slots - 1)
        if slot in self._lengths:
            raise ValueError(f"BatchShape.allocate: slot must be free, got {slot}, which is in use")
        return slot


def checked_int(
    where: str,
    name: str,
    value: SupportsIndex,
    low: int | None = None,
    high: int | None = None,
) -> int:
    """`value` as an int within `[low, high]`, else an error that names the argument."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}") from None
    if (low is not None and number < low) or (high is not None and number > high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{where}: {name} must be {expected}, got {number}")
    return number
