"""Copies and pickles of a KV cache: its rows go with it, in memory of their own; padding does not.

`KVCache` derives from this.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from baton_kernels.batch_shape import BatchShape
from baton_kernels.slot_memory import KVMemory

_Self = TypeVar("_Self", bound="RowCopies")


class RowCopies:
    """What a cache needs to be copied: its shape, its memory, and how to make and note both."""

    _shape: BatchShape
    _memory: KVMemory
    _touched: list[tuple[int, int]]

    if TYPE_CHECKING:

        def _new_memory(self, num_slots: int) -> KVMemory: ...
        def _touch(self, slot: int, shape: BatchShape) -> None: ...

    def __deepcopy__(self: _Self, memo: dict[int, Any]) -> _Self:
        """An independent cache with the same rows. Padding is not copied."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        return copied

    def __copy__(self: _Self) -> _Self:
        """As `copy.deepcopy`: two caches never share rows that either of them may change."""
        copied = self.__class__.__new__(self.__class__)
        copied._restore(self.__dict__, self._rows())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the sizes, the shape, and the rows without their padding."""
        state = {name: value for name, value in self.__dict__.items() if name != "_memory"}
        # A view would be pickled together with all the memory that it is a view of.
        return {**state, "rows": [tuple(map(_bits_of, row)) for row in self._rows()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state, state["rows"])

    def _rows(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views of the valid columns of every row in use, in the order of the slots: of keys and
        values, and of their scales."""
        for slot in self._shape.used:
            yield self._memory.row(slot, slice(self._shape.start(slot), self._shape.end(slot)))

    def _restore(self, state: Mapping[str, Any], rows: Iterable[tuple[torch.Tensor, ...]]) -> None:
        """Becomes a cache of this state with these rows, in new memory."""
        own = {name: value for name, value in state.items() if name not in ("_memory", "rows")}
        self.__dict__.update(own)
        self._shape = own["_shape"].copy()
        self._memory = self._new_memory(self._shape.num_slots)
        self._touched = [(0, 0)] * self._shape.num_slots
        for row, own_row in zip(rows, self._rows(), strict=True):
            for part, own_part in zip(row, own_row, strict=True):
                own_part.view(part.dtype).copy_(part)
        for slot in self._shape.used:
            self._touch(slot, self._shape)


def _bits_of(x: torch.Tensor) -> torch.Tensor:
    """A copy that can be pickled: torch has no pickle of float8."""
    return x.clone().view(torch.int8) if x.dtype == torch.float8_e4m3fn else x.clone()
