"""The memory of a KV cache's rows, and copies and pickles of a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from baton_kernels.batch_shape import BatchShape
from baton_kernels.slot_memory import KVMemory


class CacheMemory:
    """The state of a `KVCache`: keys and values of all slots, scales for eight-bit types, the shape
    that says which columns are valid, and the columns that each slot has had in use."""

    _num_layers: int
    _num_kv_heads: int
    _head_dim: int
    _dtype: torch.dtype
    _device: torch.device
    _huge_pages: bool
    _shape: BatchShape
    _memory: KVMemory
    # Per slot, the columns [low, high) that may have been written.
    _touched: list[tuple[int, int]]
    _bytes_moved: int

    @property
    def keys(self) -> torch.Tensor:
        """Keys `[num_layers, num_slots, num_kv_heads, capacity, head_dim]`."""
        return self._memory.keys

    @property
    def values(self) -> torch.Tensor:
        """Values `[num_layers, num_slots, num_kv_heads, capacity, head_dim]`."""
        return self._memory.values

    @property
    def key_scales(self) -> torch.Tensor | None:
        """Scales `[num_layers, num_slots, num_kv_heads, capacity]` of eight-bit keys, else None."""
        return self._memory.key_scales

    @property
    def value_scales(self) -> torch.Tensor | None:
        """Scales `[num_layers, num_slots, num_kv_heads, capacity]` of eight-bit values, else
        None."""
        return self._memory.value_scales

    @property
    def bytes_reserved(self) -> int:
        """Bytes of address space (CPU) or of device memory for keys and values, including
        scales."""
        return self._memory.num_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers, including scales."""
        return self._num_layers * self._num_kv_heads * self._memory.head_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the valid columns."""
        return self.bytes_per_token * sum(self._shape.length(slot) for slot in self._shape.used)

    @property
    def bytes_moved(self) -> int:
        """Bytes of keys and values copied within the cache so far, to keep rows aligned or to
        change the number of slots."""
        return self._bytes_moved

    @property
    def bytes_committed(self) -> int:
        """Bytes of the pages that back the cache; an upper bound if nothing writes padding.

        CPU: the pages between the lowest and the highest column that each slot has had in use since
        the cache was created or resized, or the slot released. Other devices: `bytes_reserved`.
        """
        return self._memory.committed(self._touched)

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheMemory:
        """An independent cache with the same rows. Padding is not copied."""
        copied = copy.copy(self)
        memo[id(self)] = copied
        return copied

    def __copy__(self) -> CacheMemory:
        """Like `copy.deepcopy`: two caches never share rows that either of them may change."""
        copied = type(self).__new__(type(self))
        copied._restore(self.__dict__, self._rows())
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the sizes, the shape, and the rows without their padding."""
        state = {name: value for name, value in self.__dict__.items() if name != "_memory"}
        # Pickling a view would include all the memory that it is a view of.
        return {**state, "rows": [tuple(map(_bits_of, row)) for row in self._rows()]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._restore(state, state["rows"])

    def _rows(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views of the valid columns of every row in use, in the order of the slots: of keys and
        values, and of their scales."""
        for slot in self._shape.used:
            yield self._memory.row(slot, slice(self._shape.start(slot), self._shape.end(slot)))

    def _restore(self, state: Mapping[str, Any], rows: Iterable[tuple[torch.Tensor, ...]]) -> None:
        """Becomes a cache with this state and these rows, in new memory."""
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

    def _new_memory(self, num_slots: int) -> KVMemory:
        capacity = self._shape.capacity
        sizes = (self._num_layers, num_slots, self._num_kv_heads, capacity, self._head_dim)
        return KVMemory(sizes, self._dtype, self._device, huge_pages=self._huge_pages)

    def _touch(self, slot: int, shape: BatchShape) -> None:
        start, end = shape.start(slot), shape.end(slot)
        low, high = self._touched[slot]
        if start < end:
            self._touched[slot] = (min(low, start), max(high, end)) if low < high else (start, end)


def _bits_of(x: torch.Tensor) -> torch.Tensor:
    """A copy that can be pickled, because torch cannot pickle float8."""
    return x.clone().view(torch.int8) if x.dtype == torch.float8_e4m3fn else x.clone()
