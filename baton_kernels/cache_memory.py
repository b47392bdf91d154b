"""The memory of a KV cache's rows, and how copies and pickles of a cache get their own."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from baton_kernels.batch_shape import BatchShape
from baton_kernels.slot_memory import SlotMemory

# What a copy of a cache makes anew.
_MEMORIES = ("_key_memory", "_value_memory")


class CacheMemory:
    """What `KVCache` is made of: keys and values of all slots, the shape that says which of their
    columns are valid, and which columns each slot has had in use."""

    _num_layers: int
    _num_kv_heads: int
    _head_dim: int
    _dtype: torch.dtype
    _device: torch.device
    _huge_pages: bool
    _shape: BatchShape
    _key_memory: SlotMemory
    _value_memory: SlotMemory
    # Per slot, the columns [low, high) that may have been written.
    _touched: list[tuple[int, int]]

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheMemory:
        """An independent cache with the same rows. Padding is not copied."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> CacheMemory:
        """As `copy.deepcopy`: two caches never share rows that either of them may change."""
        copied = type(self).__new__(type(self))
        copied._restore(self.__dict__, self._rows())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the sizes, the shape, and the rows without their padding."""
        state = {name: value for name, value in self.__dict__.items() if name not in _MEMORIES}
        # A view would be pickled together with all the memory that it is a view of.
        return {**state, "rows": [(key.clone(), value.clone()) for key, value in self._rows()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state, state["rows"])

    def _rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Views of the valid columns of every row in use, in the order of the slots."""
        keys, values = self._key_memory.tensor, self._value_memory.tensor
        for slot in self._shape.used:
            columns = slice(self._shape.start(slot), self._shape.end(slot))
            yield keys[:, slot, :, columns], values[:, slot, :, columns]

    def _restore(
        self, state: Mapping[str, Any], rows: Iterable[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Becomes a cache of this state with these rows, in new memory."""
        own = {name: value for name, value in state.items() if name not in (*_MEMORIES, "rows")}
        self.__dict__.update(own)
        self._shape = own["_shape"].copy()
        self._key_memory, self._value_memory = self._new_memory(self._shape.num_slots)
        self._touched = [(0, 0)] * self._shape.num_slots
        for (key, value), (own_key, own_value) in zip(rows, self._rows(), strict=True):
            own_key.copy_(key)
            own_value.copy_(value)
        for slot in self._shape.used:
            self._touch(slot, self._shape)

    def _new_memory(self, num_slots: int) -> tuple[SlotMemory, SlotMemory]:
        capacity = self._shape.capacity
        sizes = (self._num_layers, num_slots, self._num_kv_heads, capacity, self._head_dim)
        keys, values = (
            SlotMemory(sizes, self._dtype, self._device, huge_pages=self._huge_pages)
            for _ in range(2)
        )
        return keys, values

    def _touch(self, slot: int, shape: BatchShape) -> None:
        start, end = shape.start(slot), shape.end(slot)
        low, high = self._touched[slot]
        if start < end:
            self._touched[slot] = (min(low, start), max(high, end)) if low < high else (start, end)
