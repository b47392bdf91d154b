"""The rows of one KV cache and the queries in them: who enters and leaves, what is computed.

The cache may run ahead of a query by one forward: columns are reserved before the model runs, and
`Query.cached` follows once the tokens count. A forward that failed or was interrupted is therefore
just run again, into the same columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

import baton_kernels

from .packed_batch import PackedBatch
from .query import Query


class Row(NamedTuple):
    """What a forward computes of one query: its next `count` tokens."""

    query: Query
    count: int


class Slots:
    """A cache of a model with the queries that live in it.

    Args:
        model: has `new_cache` and `forward` as `PatchedLlama`.
        num_slots: rows.
        capacity: columns of a row.
        aligned: whether all rows end in one column.
    """

    def __init__(self, model, num_slots: int, capacity: int, *, aligned: bool = False):
        self.model = model
        self.cache = model.new_cache(num_slots, capacity, aligned=aligned)

    @property
    def num_slots(self) -> int:
        """Rows of the cache."""
        return self.cache.shape.num_slots

    def lagging(self, query: Query) -> bool:
        """Whether the row already has columns for tokens that do not count yet."""
        return query.slot is not None and self.cache.shape.length(query.slot) > query.cached

    def enter(self, query: Query, length: int) -> None:
        """Give the query a free row of `length` tokens, which begins with what it had parked."""
        cache = self.cache
        if query._parked_kv is None:
            query.slot = cache.allocate(length)
            return
        key, value = (tensor.to(cache.keys.device) for tensor in query._parked_kv)
        slot = cache.allocate(length)
        try:
            index = torch.tensor(
                [0, query.cached, slot, cache.shape.start(slot)],
                dtype=torch.int32,
                device=cache.keys.device,
            )
            baton_kernels.insert_kv(
                key, value, cache.keys, cache.values, index[:2], index[2:3], index[3:]
            )
        except BaseException:
            cache.free(slot)
            raise
        query.slot = slot
        query._parked_kv = None

    def leave(self, query: Query) -> None:
        """Free the query's row, if it has one, and forget its keys and values."""
        query._parked_kv = None
        if query.slot is not None:
            self.cache.free(query.slot)
            query.slot = None

    def park(self, query: Query) -> None:
        """Copy the query's row to host memory and free it."""
        if query.slot is None:
            return
        if query.cached:
            # A row that lags has one token more than counts; it is computed again after the return.
            key, value = (
                tensor[:, : query.cached].cpu() for tensor in self.cache.extract(query.slot)
            )
            query._parked_kv = (key.contiguous(), value.contiguous())
        self.cache.free(query.slot)
        query.slot = None

    def relocate(self, query: Query) -> None:
        """Move the query's row to the lowest free slot, with the columns that do not count yet."""
        key, value = self.cache.extract(query.slot)
        self.cache.free(query.slot)
        query.slot = None
        query.slot = self.cache.insert(key, value)

    def reserve(self, rows: Sequence[Row]) -> None:
        """Columns for what the queries that have a row compute next, where they lack them."""
        shape = self.cache.shape
        missing = {
            query.slot: query.cached + count - shape.length(query.slot) for query, count in rows
        }
        missing = {slot: count for slot, count in missing.items() if count > 0}
        if missing:
            self.cache.extend(list(missing), list(missing.values()))

    def compute(self, rows: Sequence[Row]) -> torch.Tensor:
        """Run the model on rows whose columns are reserved.

        Returns:
            float32 [rows, vocab]: the logits after the last token of every row.
        """
        tokens = [token for query, count in rows for token in query.pending_tokens(count)]
        device = self.cache.keys.device
        slots, counts = [query.slot for query, _ in rows], [count for _, count in rows]
        batch = PackedBatch.from_shape(self.cache.shape, slots, counts, device)
        return self.model.forward(
            torch.tensor(tokens, device=device), batch, self.cache, logits="last"
        )
