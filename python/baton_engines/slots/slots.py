"""The rows of one KV cache and the queries in them: who enters and leaves, what is computed.

The cache may run ahead of a query by one forward: columns are reserved before the model runs, and
`Query.cached` follows once the tokens count. A forward that failed or was interrupted is therefore
just run again, into the same columns.
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

# How an aligned cache stays aligned when a row enters or leaves: the rows that must move do, or all
# rows are copied into a new cache.
SHAPINGS = ("in_place", "concatenate")


# Any id would do: nothing reads what is computed from it.
_PADDING_TOKEN = 0


class Row(NamedTuple):
    """What a forward computes of one query: its next tokens."""

    query: Query
    num_tokens: int


class Slots:
    """A cache of a model with the queries that live in it.

    Args:
        model: ModelHandle.
        num_slots: rows.
        capacity: columns of a row.
        aligned: whether all rows end in one column.
        shaping: how an aligned cache is kept so, one of `SHAPINGS`.
        padded: whether forwards may be padded; the cache then has columns for the padding too.
        kv_budget: the most bytes of keys and values in the rows; None without a bound.
        kv_dtype: of keys and values; None for the model's.
        prefix_bytes: the most bytes of keys and values that are kept of texts, for queries that
            begin alike; None keeps nothing.

    Attributes:
        prefixes: what is kept, or None.
        whole_prompts: whether a prompt has to be computed in one forward.
        parked_bytes: of the keys and values in host memory.
        parking_bytes: copied to host memory and back so far.
        reused_tokens: tokens of prompts that were copied instead of computed so far.
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
        # By query, the version of the prefix cache in which its beginning was looked for.
        self._looked_up: WeakKeyDictionary[Query, int] = WeakKeyDictionary()
        # A row of c tokens is padded by c - 1 at most.
        columns = 2 * capacity - 1 if padded else capacity
        self.cache = model.new_cache(num_slots, columns, aligned=aligned, dtype=kv_dtype)
        if shaping == "concatenate":
            self.cache = ConcatenatedCache(self.cache)

    @property
    def num_slots(self) -> int:
        """Rows of the cache."""
        return self.cache.shape.num_slots

    def length(self, query: Query) -> int:
        """Columns of the query's row; 0 without a row."""
        return 0 if query.slot is None else self.cache.shape.length(query.slot)

    def lagging(self, query: Query) -> bool:
        """Whether the row already has columns for tokens that do not count yet."""
        return query.slot is not None and self.length(query) > query.cached

    def vacant(self, query: Query) -> bool:
        """Whether the query has a row, and that has no columns."""
        return query.slot is not None and self.length(query) == 0

    def enter(self, query: Query, length: int) -> None:
        """Give the query a free row of `length` tokens, which begins with what it had parked."""
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
        """Set `Query.cached` of a query that nothing is computed of to what `enter` can copy."""
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
        """Keep the first tokens of the query's row for queries that begin alike.

        Args:
            query: one whose keys and values are all finite.
            num_tokens: at most as many as count; on a GPU no more than the prompt has, because keys
                that were decoded there have other bits than computed ones.
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

        # Without memory for it, the next query computes its own; nobody loses anything.
        with contextlib.suppress(MemoryError, torch.OutOfMemoryError):
            self.prefixes.keep(tokens, read)

    @property
    def _computed_at_least(self) -> int:
        # The last token's logits are needed. On a GPU a chunk of one token is computed by other
        # kernels than a longer one, and has other bits.
        return 1 if self.cache.keys.device.type == "cpu" else 2

    def _enter_fresh(self, query: Query, length: int) -> None:
        """A row of `length` tokens for a query without one, which may begin with kept ones."""
        blocks: list[KeysValues] = []
        if self.prefixes is not None and query.cached:
            blocks = self.prefixes.take(query.prompt, query.cached)
            # Some may have been dropped since `look_up`; they are computed then.
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
        """Replace the query's row, which is vacant, by one of keys and values computed elsewhere.

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
        """A free row of `length` tokens that begins with these `tokens`; its slot."""
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
        """Write the first tokens of key and value into a row, from a column on."""
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
        """Copy the prompt to host memory before its row is freed, if others still need it."""
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
        """The query needs the shared prompt no more; the last one lets go of it."""
        shared.pending.pop(query.id, None)
        if not shared.pending and shared.parked is not None:
            self.parked_bytes -= _num_bytes(shared.parked)
            shared.parked = None

    def relocate(self, query: Query) -> None:
        """Move the query's row to the lowest free slot, with the columns that do not count yet."""
        slot = _slot_of(query)
        key, value = self.cache.extract(slot)
        self.cache.free(slot)
        query.slot = None
        query.slot = self.cache.insert(key, value)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether the cache stays within its budget when these rows get what they lack."""
        if self.kv_budget is None:
            return True
        tokens = 0
        for query, count in rows:
            tokens += max(0, query.cached + count - self.length(query))
        return self.cache.bytes_in_use + tokens * self.cache.bytes_per_token <= self.kv_budget

    def reserve(self, rows: Sequence[Row]) -> None:
        """Columns for what the queries that have a row compute next, where they lack them."""
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
            float32 [rows, vocab]: the logits after the last token of every row.
        """
        if padded:
            # The columns for padding lie behind those of the longest row.
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
            torch.tensor(tokens, device=device), batch, self.cache, logits="last"
        )

    def _drop_parked(self, query: Query) -> None:
        self.parked_bytes -= _bytes_of(query)
        query.parked_kv = None


def _slot_of(query: Query) -> int:
    """The row of a query that has one."""
    if query.slot is None:
        raise RuntimeError(f"Relay: query {query.id} must be in a slot, got {query!r}")
    return query.slot


def _bytes_of(query: Query) -> int:
    """Of the keys and values that the query has parked."""
    return _num_bytes(query.parked_kv or ())


def _num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
