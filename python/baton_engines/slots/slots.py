"""The rows of one KV cache and the queries in them: entering, leaving, and computing.

The cache may be ahead of a query by one forward: columns are reserved before the model runs, and
`Query.cached` follows once the tokens count. So a forward that failed or was interrupted is simply
run again, into the same columns.
"""

import contextlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

import baton_kernels

from ..llama.handle import ModelHandle
from ..llama.packed_batch import PackedBatch
from ..query import Query, SharedPrompt
from .concatenated_cache import ConcatenatedCache
from .prefix_cache import KeysValues, PrefixCache

# How an aligned cache stays aligned when a row enters or leaves: rows are moved as needed, or all
# rows are copied into a new cache.
SHAPINGS = ("in_place", "concatenate")


# An arbitrary id: nothing reads what is computed from it.
_PADDING_TOKEN = 0


class Row(NamedTuple):
    """The next tokens that a forward computes for one query."""

    query: Query
    num_tokens: int


class Slots:
    """A model's cache with the queries that are in it.

    Args:
        model: ModelHandle.
        num_slots: rows.
        capacity: columns of a row.
        aligned: whether all rows end in one column.
        shaping: how an aligned cache is kept aligned, one of `SHAPINGS`.
        padded: whether forwards may be padded; the cache then has columns for the padding too.
        kv_budget: the most bytes of keys and values in the rows; None without a limit.
        kv_dtype: of keys and values; None for the model's.
        prefix_bytes: the most bytes of keys and values that are kept for queries with the same
            beginning; None keeps nothing.

    Attributes:
        prefixes: the prefix cache, or None.
        whole_prompts: whether a prompt has to be computed in one forward.
        parked_bytes: bytes of the keys and values in host memory.
        parking_bytes: bytes copied to host memory and back so far.
        reused_tokens: prompt tokens that were copied instead of computed so far.
        reusing_queries: queries with such tokens so far.
    """

    def __init__(
        self,
        model: ModelHandle,
        num_slots: int,
        capacity: int,
        *,
        aligned: bool = False,
        shaping: str = SHAPINGS[0],
        padded: bool = False,
        kv_budget: int | None = None,
        kv_dtype: torch.dtype | None = None,
        prefix_bytes: int | None = None,
    ):
        if shaping not in SHAPINGS:
            raise ValueError(
                f"Relay: shaping must be one of {', '.join(SHAPINGS)}, got {shaping!r}"
            )
        if shaping != SHAPINGS[0] and not aligned:
            raise ValueError(f"Relay: aligned must be True for shaping {shaping!r}, got False")
        self.model = model
        self.whole_prompts = aligned or model.whole_prompts
        if prefix_bytes is not None and self.whole_prompts:
            raise ValueError(
                "Relay: prefix_cache must be None in an aligned cache and under dynamic RoPE, "
                f"where prompts are computed whole, got {prefix_bytes}"
            )
        self.capacity = capacity
        self.kv_budget = kv_budget
        self.parked_bytes = self.parking_bytes = 0
        self.prefixes = None if prefix_bytes is None else PrefixCache(prefix_bytes)
        self.reused_tokens = self.reusing_queries = 0
        # For each query, the version of the prefix cache in which its beginning was last searched.
        self._looked_up: WeakKeyDictionary[Query, int] = WeakKeyDictionary()
        # A row of c tokens is padded by at most c - 1.
        columns = 2 * capacity - 1 if padded else capacity
        self.cache = model.new_cache(num_slots, columns, aligned=aligned, dtype=kv_dtype)
        if shaping == "concatenate":
            self.cache = ConcatenatedCache(self.cache)

    @property
    def num_slots(self) -> int:
        """The number of rows of the cache."""
        return self.cache.shape.num_slots

    def length(self, query: Query) -> int:
        """The number of columns of the query's row; 0 without a row."""
        return 0 if query.slot is None else self.cache.shape.length(query.slot)

    def lagging(self, query: Query) -> bool:
        """Whether the row already has columns for tokens that do not count yet."""
        return query.slot is not None and self.length(query) > query.cached

    def vacant(self, query: Query) -> bool:
        """Whether the query has a row that has no columns."""
        return query.slot is not None and self.length(query) == 0

    def enter(self, query: Query, length: int) -> None:
        """Give the query a free row of `length` tokens; what it had parked is copied into it."""
        shared = query.shared_prompt
        if shared is not None and shared.ready and query.id in shared.pending:
            self._copy_shared(query, shared, length)
            return
        if query.parked_kv is None:
            self._enter_fresh(query, length)
            return
        query.slot = self._insert(*query.parked_kv, query.cached, length)
        self.parking_bytes += _bytes_of(query)
        self._drop_parked(query)

    def look_up(self, query: Query) -> None:
        """Set `Query.cached` to what `enter` can copy, for a query that has nothing computed."""
        prefixes = self.prefixes
        if prefixes is None or query.slot is not None or query.parked_kv is not None:
            return
        shared = query.shared_prompt
        copies_a_row = shared is not None and query.id in shared.pending
        if copies_a_row or query.tokens or self._looked_up.get(query) == prefixes.version:
            return
        self._looked_up[query] = prefixes.version
        query.cached = prefixes.find(query.prompt, len(query.prompt) - self._computed_at_least)

    def keep_prefix(self, query: Query, num_tokens: int) -> None:
        """Keep the first tokens of the query's row for queries with the same beginning.

        Args:
            query: its keys and values must be finite.
            num_tokens: at most the tokens that count. On a GPU at most the prompt's, because there
                keys from decoding have other bits than keys from prefill.
        """
        slot = query.slot
        if self.prefixes is None or slot is None:
            return
        if self.cache.keys.device.type != "cpu":
            num_tokens = min(num_tokens, len(query.prompt))
        cache, start = self.cache, self.cache.shape.start(slot)
        tokens = (query.prompt + query.tokens)[:num_tokens]

        def read(begin: int, end: int) -> KeysValues:
            index = torch.tensor(
                [0, end - begin, slot, start + begin], dtype=torch.int32, device=cache.keys.device
            )
            key, value = baton_kernels.extract_kv(
                cache.keys, cache.values, index[:2], index[2:3], index[3:],
                total_tokens=end - begin, **cache.scales(),
            )  # fmt: skip
            return KeysValues(key, value)

        # Without memory for it, the next query computes its own; no query is affected.
        with contextlib.suppress(MemoryError, torch.OutOfMemoryError):
            self.prefixes.keep(tokens, read)

    @property
    def _computed_at_least(self) -> int:
        # The last token's logits are needed. On a GPU a chunk of one token is computed by other
        # kernels than a longer chunk and has other bits.
        return 1 if self.cache.keys.device.type == "cpu" else 2

    def _enter_fresh(self, query: Query, length: int) -> None:
        """Give a query a row of `length` tokens, which may begin with tokens of the prefix
        cache."""
        blocks: list[KeysValues] = []
        if self.prefixes is not None and query.cached:
            blocks = self.prefixes.take(query.prompt, query.cached)
            # Some blocks may have been dropped since `look_up`; their tokens are then computed.
            held = sum(block.key.shape[1] for block in blocks)
            length -= query.cached - held
            query.cached = held
        slot = self.cache.allocate(length)
        try:
            column = self.cache.shape.start(slot)
            for block in blocks:
                tokens = block.key.shape[1]
                self._write(*block, tokens, slot, column)
                column += tokens
        except BaseException:
            self.cache.free(slot)
            raise
        query.slot = slot
        self.reused_tokens += query.cached
        self.reusing_queries += bool(blocks)

    def fill(self, query: Query, key: torch.Tensor, value: torch.Tensor) -> None:
        """Replace the query's vacant row by one with keys and values that were computed elsewhere.

        Args:
            query: may have lost its row in a call that was interrupted.
            key, value: `[num_layers, tokens, num_kv_heads, head_dim]`, on any device.
        """
        slot, query.slot = query.slot, None
        if slot is not None:
            self.cache.free(slot)
        query.slot = self._insert(key, value, key.shape[1], key.shape[1], slot)

    def _insert(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        tokens: int,
        length: int,
        slot: int | None = None,
    ) -> int:
        """A free row of `length` tokens that begins with these `tokens`; returns its slot."""
        cache = self.cache
        key, value = key.to(cache.keys.device), value.to(cache.keys.device)
        slot = cache.allocate(length, slot)
        try:
            self._write(key, value, tokens, slot, cache.shape.start(slot))
        except BaseException:
            cache.free(slot)
            raise
        return slot

    def _write(
        self, key: torch.Tensor, value: torch.Tensor, tokens: int, slot: int, column: int
    ) -> None:
        """Write the first tokens of key and value into a row, beginning at a column."""
        cache = self.cache
        index = torch.tensor([0, tokens, slot, column], dtype=torch.int32, device=cache.keys.device)
        baton_kernels.insert_kv(
            key, value, cache.keys, cache.values, index[:2], index[2:3], index[3:],
            **cache.scales(),
        )  # fmt: skip

    def leave(self, query: Query) -> None:
        """Free the query's row, if it has one, and forget its keys and values."""
        self._drop_parked(query)
        if query.shared_prompt is not None:
            self._keep_shared(query, query.shared_prompt)
            self._take_from(query.shared_prompt, query)
        if query.slot is not None:
            self.cache.free(query.slot)
            query.slot = None

    def park(self, query: Query) -> None:
        """Copy the query's row to host memory and free it."""
        if query.slot is None:
            return
        if query.shared_prompt is not None:
            self._keep_shared(query, query.shared_prompt)
        if query.cached:
            # A row that lags has one token more than counts; it is computed again after the return.
            key, value = (
                tensor[:, : query.cached].cpu() for tensor in self.cache.extract(query.slot)
            )
            query.parked_kv = (key.contiguous(), value.contiguous())
            self.parked_bytes += _bytes_of(query)
            self.parking_bytes += _bytes_of(query)
        self.cache.free(query.slot)
        query.slot = None

    def _copy_shared(self, query: Query, shared: SharedPrompt, length: int) -> None:
        """A row that begins with the prompt which another query has computed."""
        if shared.lost is not None:
            raise shared.lost
        if shared.parked is None:
            query.slot = self.cache.copy_row(_slot_of(shared.leader), length=length)
        else:
            query.slot = self._insert(*shared.parked, query.cached, length)
            self.parking_bytes += _num_bytes(shared.parked)
        self._take_from(shared, query)

    def _keep_shared(self, query: Query, shared: SharedPrompt) -> None:
        """Copy the prompt to host memory before its row is freed, if other queries still need
        it."""
        is_needed = shared.ready and shared.pending and shared.parked is None
        if query is not shared.leader or query.slot is None or not is_needed:
            return
        tokens = len(query.prompt)
        try:
            key, value = (tensor[:, :tokens].cpu() for tensor in self.cache.extract(query.slot))
            shared.parked = (key.contiguous(), value.contiguous())
        except (MemoryError, RuntimeError) as error:
            shared.lost = error
            return
        self.parked_bytes += _num_bytes(shared.parked)
        self.parking_bytes += _num_bytes(shared.parked)

    def _take_from(self, shared: SharedPrompt, query: Query) -> None:
        """The query needs the shared prompt no longer; the last such call releases it."""
        shared.pending.pop(query.id, None)
        if not shared.pending and shared.parked is not None:
            self.parked_bytes -= _num_bytes(shared.parked)
            shared.parked = None

    def relocate(self, query: Query) -> None:
        """Move the query's row to the lowest free slot, including columns that do not count yet."""
        slot = _slot_of(query)
        key, value = self.cache.extract(slot)
        self.cache.free(slot)
        query.slot = None
        query.slot = self.cache.insert(key, value)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the cache stays within its budget when these rows get the columns they lack."""
        if self.kv_budget is None:
            return True
        tokens = 0
        for query, count in rows:
            tokens += max(0, query.cached + count - self.length(query))
        return self.cache.bytes_in_use + tokens * self.cache.bytes_per_token <= self.kv_budget

    def reserve(self, rows: Sequence[Row]) -> None:
        """Reserve the columns that queries with a row lack for what they compute next."""
        missing: dict[int, int] = {}
        for query, count in rows:
            lacking = query.cached + count - self.length(query)
            if lacking > 0:
                missing[_slot_of(query)] = lacking
        if missing:
            self.cache.extend(list(missing), list(missing.values()))

    def compute(self, rows: Sequence[Row], *, padded: bool = False) -> torch.Tensor:
        """Run the model on rows whose columns are reserved.

        Args:
            rows: what to compute.
            padded: whether each row is padded to the longest.

        Returns:
            [rows, vocab]: the logits after the last token of every row, as the model computed them.
        """
        if padded:
            # The columns for padding follow those of the longest row.
            self.cache.trim()
        longest = max(count for _, count in rows)
        tokens: list[int] = []
        for query, count in rows:
            tokens += query.pending_tokens(count)
            tokens += [_PADDING_TOKEN] * (longest - count if padded else 0)
        device = self.cache.keys.device
        slots, counts = [_slot_of(query) for query, _ in rows], [count for _, count in rows]
        batch = PackedBatch.from_shape(self.cache.shape, slots, counts, device, padded=padded)
        return self.model.forward(
            torch.tensor(tokens, device=device), batch, self.cache, logits="last", float32=False
        )

    def _drop_parked(self, query: Query) -> None:
        self.parked_bytes -= _bytes_of(query)
        query.parked_kv = None


def _slot_of(query: Query) -> int:
    """The slot of a query that has one."""
    if query.slot is None:
        raise RuntimeError(f"Relay: query {query.id} must be in a slot, got {query!r}")
    return query.slot


def _bytes_of(query: Query) -> int:
    """Bytes of the query's parked keys and values."""
    return _num_bytes(query.parked_kv or ())


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
