"""An aligned cache that is shaped the naive way: concatenate and pad, select and trim.

When a row enters or leaves, the whole cache is made anew, including padding, as `torch.cat` of
padded rows and indexing of the remaining ones would do. It exists to be compared with `KVCache`,
which moves only what has to move. In one respect it is better than code that concatenates at every
step: columns for decode steps are allocated beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from baton_kernels import BatchShape, KVCache, insert_kv


class ConcatenatedCache(KVCache):
    """Like an aligned `KVCache`, but every insertion and removal rewrites all rows.

    Args:
        cache: KVCache, aligned; only its sizes, dtype and device are used.

    Source: BATON, shaping; text-generation-inference, batches of a causal language model.
    """

    def __init__(self, cache: KVCache):
        layers, slots, heads, capacity, head_dim = cache.keys.shape
        super().__init__(
            layers,
            slots,
            heads,
            capacity,
            head_dim,
            dtype=cache.keys.dtype,
            device=cache.keys.device,
            aligned=True,
        )

    def allocate(self, length: int, slot: int | None = None) -> int:
        """Like `KVCache.allocate`: all rows are padded on the left to the longest, in a new
        cache."""
        planned = self._shape.copy()
        slot, _ = planned.allocate(length, slot)
        self._rewrite(planned, self._shape.used if length else ())
        return slot

    def insert(self, key: torch.Tensor, value: torch.Tensor, slot: int | None = None) -> int:
        """Like `KVCache.insert`, into a new cache."""
        slot = self.allocate(key.shape[1], slot)
        columns = slice(self._shape.start(slot), self._shape.end(slot))
        if self.key_scales is not None:
            index = self._index([0, key.shape[1], slot, columns.start])
            places = index[:2], index[2:3], index[3:]
            insert_kv(key, value, self.keys, self.values, *places, **self.scales())
            return slot
        self.keys[:, slot, :, columns] = key.transpose(1, 2)
        self.values[:, slot, :, columns] = value.transpose(1, 2)
        return slot

    def free(self, slot: int) -> None:
        """Like `KVCache.free`: the other rows move to a new cache without their common padding."""
        planned = self._shape.copy()
        planned.free(slot)
        if self._shape.length(slot) == 0:
            # It was not yet a row of a tensor.
            self._commit(planned)
            return
        planned.trim()
        self._rewrite(planned, planned.used)

    def _rewrite(self, planned: BatchShape, kept: Iterable[int]) -> None:
        kept = [slot for slot in kept if planned.length(slot)]
        if not kept:
            self._commit(planned)
            return
        memory = self._new_memory(planned.num_slots)
        for slot in kept:
            start = planned.start(slot)
            for padding in memory.row(slot, slice(start)):
                padding.zero_()
            rows = memory.row(slot, slice(start, planned.end(slot)))
            former = slice(self._shape.start(slot), self._shape.end(slot))
            for new, old in zip(rows, self._memory.row(slot, former), strict=True):
                new.copy_(old)
            self._bytes_moved += self.bytes_per_token * planned.width
        self._memory = memory
        self._touched = [(0, 0)] * planned.num_slots
        self._commit(planned)
        for slot in kept:
            self._touched[slot] = (0, planned.width)
