"""A model without weights, for tests of the layers above a forward pass: the relay and policies.

It keeps token ids in a real `KVCache` and computes logits from the query that it finds in the
cache. So a key in a wrong row, column or order, or a token computed twice or left out, changes the
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from baton_kernels import KVCache, append_kv

from ..llama.handle import ModelHandle
from ..llama.packed_batch import PackedBatch


class FakeLlama(ModelHandle):
    """Stands in for a `PatchedLlama`.

    Args:
        vocab_size: of the logits.
        eos: the model's end-of-sequence id.
        max_positions: the longest query.

    Attributes:
        fault: called with the tokens of every row of a forward, newest last, after the cache was
            written; the forward raises what it raises.
        bad_row: called with the tokens of a row; if it returns True, the row's logits become NaN.
        whole_prompts: as `PatchedLlama.whole_prompts`.
        forwards: for every forward that was tried, the number of tokens computed per row.
        padding: for each of these forwards, the number of additional padding tokens.
    """

    num_layers = 2
    num_kv_heads = 1
    head_dim = 16
    dtype = torch.float32
    takes_eight_bits = True
    device = torch.device("cpu")

    def __init__(self, vocab_size: int = 50, eos: int | None = None, max_positions: int = 256):
        self.vocab_size = vocab_size
        self.model = SimpleNamespace(
            config=SimpleNamespace(max_position_embeddings=max_positions, eos_token_id=eos)
        )
        self.fault: Callable[[list[list[int]]], object] = _nothing
        self.bad_row: Callable[[list[int]], bool] = _nothing
        self.whole_prompts = False
        self.forwards: list[tuple[int, ...]] = []
        self.padding: list[int] = []

    def twin(self) -> FakeLlama:
        """See `PatchedLlama.twin`."""
        return self

    def undo(self) -> None:
        """Does nothing: nothing was changed."""

    def forward(
        self,
        token_ids: torch.Tensor,
        batch: PackedBatch,
        cache: KVCache,
        *,
        logits: str = "last",
        float32: bool = True,
    ) -> torch.Tensor:
        """See `PatchedLlama.forward` with `logits="last"`."""
        self.forwards.append(batch.query_lengths)
        self.padding.append(sum(batch.padding))
        key, value = (
            x.float()[:, None, None].repeat(1, 1, self.head_dim)
            for x in (token_ids, batch.positions)
        )
        places = batch.token_slots, batch.token_columns
        for layer in range(self.num_layers):
            append_kv(key, value, *cache.layer(layer), *places, **cache.scales(layer))
        rows = [
            self._read(cache, slot, start, length)
            for slot, start, length in zip(
                batch.slots.tolist(), batch.starts.tolist(), batch.total_lengths, strict=True
            )
        ]
        self.fault(rows)
        return torch.stack([self.logits_of(tokens) for tokens in rows])

    def logits_of(self, tokens: Sequence[int]) -> torch.Tensor:
        """The logits after `tokens`, float32 [vocab]."""
        if self.bad_row(list(tokens)):
            return torch.full((self.vocab_size,), torch.nan)
        # hash() of integers is the same in every process.
        generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**63)
        return torch.randn(self.vocab_size, generator=generator)

    def decode_alone(self, prompt: Sequence[int], count: int) -> list[int]:
        """The greedy answer of `count` tokens, without any cache."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits_of(tokens).argmax()))
        return tokens[len(prompt) :]

    @staticmethod
    def _read(cache: KVCache, slot: int, start: int, length: int) -> list[int]:
        row = slice(None), slot, 0, slice(start, start + length)
        keys, values = cache.keys[row].float(), cache.values[row].float()
        if cache.key_scales is not None and cache.value_scales is not None:
            # An integer times 127 / 127, or 448 / 448, is the integer up to the last bits.
            keys = (keys * cache.key_scales[row][..., None]).round()
            values = (values * cache.value_scales[row][..., None]).round()
        expected = torch.arange(length, dtype=values.dtype)[None, :, None]
        if not (
            torch.equal(keys, keys[:1, :, :1].expand_as(keys)) and torch.all(values == expected)
        ):
            raise AssertionError(f"slot {slot} does not hold one query in order: {values[0, :, 0]}")
        return keys[0, :, 0].int().tolist()


def _nothing(tokens: object) -> bool:
    # Not a lambda, so that the model can be sent to another process.
    return False
