"""Attention problems: a batch's queries and caches, and the expected result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from baton_kernels import KVCache
from baton_kernels.testing import Accuracy, cumulative, int32

# Columns on either side of a row that the gate poisons: more than any kernel reads at once.
POISONED = 64
# Query tokens per row that the gate checks, including the first and the last; and number of rows.
CHECKED = 16
CHECKED_ROWS = 64
# The most copies of the data.
MAX_LAYERS = 64


@dataclass(frozen=True)
class Heads:
    """A model's attention: query heads, key and value heads, elements of a head."""

    query: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.query}/{self.kv} x {self.dim}"


class Device(Protocol):
    """Where a problem is stored: the device's name, and the bytes of caches in front of its
    memory."""

    name: str
    cache_bytes: int


class AttentionWork:
    """A batch in a KV cache whose layers are copies of each other.

    A decode step makes one call per layer; with enough layers, none is in the processor's cache
    when its turn comes.

    Args:
        heads: The model's.
        query_lengths: Per row, the number of its last tokens that are queries.
        lengths: Valid columns per row.
        capacity: Columns of a slot; just enough if None.
        dtype: Of all tensors.
        device: Where they are: `options.Cpu` or `cuda.Cuda`.
        aligned: Whether rows end in the last column; otherwise they begin in column 0.
        huge_pages: Whether the cache uses them.
        window: Tokens that a token sees; all before it if None. For decode steps only.
    """

    def __init__(
        self,
        heads: Heads,
        query_lengths: Sequence[int],
        lengths: Sequence[int],
        *,
        capacity: int | None = None,
        dtype: torch.dtype,
        device: Device,
        aligned: bool = False,
        huge_pages: bool = False,
        window: int | None = None,
    ):
        self.heads, self.dtype, self.device = heads, dtype, device.name
        self.query_lengths, self.lengths = list(query_lengths), list(lengths)
        self.capacity = capacity or max(lengths)
        ends = [self.capacity if aligned else length for length in lengths]
        self.starts = [end - length for end, length in zip(ends, lengths, strict=True)]
        self.window = window
        self.visible = [length if window is None else min(length, window) for length in lengths]
        self.columns = sum(self.visible)
        self.bytes = 2 * self.columns * heads.kv * heads.dim * dtype.itemsize
        # Scores of visible pairs; each takes `dim` products with keys and `dim` with values.
        pairs = sum(
            q * length - q * (q - 1) // 2 for q, length in zip(query_lengths, lengths, strict=True)
        )
        self.pairs = pairs
        self.flops = 4 * pairs * heads.query * heads.dim

        # Between two visits of the same column, four times the last cache level is read.
        def copies(num_bytes: int) -> int:
            return max(2, min(MAX_LAYERS, -(-4 * device.cache_bytes // num_bytes) + 1))

        self.layers = copies(self.bytes)
        # Peers that also read padding read more, and the padding has to exist.
        self.dense_layers = copies(self.bytes // self.columns * len(lengths) * self.capacity)
        self.cache = KVCache(
            self.layers, len(lengths), heads.kv, self.capacity, heads.dim,
            dtype=dtype, device=self.device, huge_pages=huge_pages,
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)

        # A GPU's cache takes gigabytes, which would take minutes to generate on the host.
        def normal(*shape: int) -> torch.Tensor:
            if self.device == "cuda":
                return torch.randn(shape, device=self.device, dtype=dtype)
            return torch.randn(shape, generator=generator).to(dtype)

        self.query = normal(sum(query_lengths), heads.query, heads.dim)
        for row, (start, end) in enumerate(zip(self.starts, ends, strict=True)):
            for tensor in (self.cache.keys, self.cache.values):
                tensor[:, row, :, start:end] = normal(heads.kv, end - start, heads.dim)
        self._finite = False
        self.cu_seqlens = cumulative(query_lengths, self.device)
        self.index = (
            int32(range(len(lengths)), self.device),
            int32(self.starts, self.device),
            int32(lengths, self.device),
        )

    def poison_padding(self) -> None:
        """Writes NaN into the columns around every row, so that reading them gives a wrong
        result."""
        self._fill_padding(float("nan"), POISONED, self.layers)
        self._finite = False

    def finite_padding(self) -> None:
        """Zeros the padding of dense_layers, which peers read and multiply by zero."""
        if not self._finite:
            self._fill_padding(0.0, self.capacity, self.dense_layers)
            self._finite = True

    def _fill_padding(self, value: float, reach: int, layers: int) -> None:
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            end = start + length
            for tensor in (self.cache.keys, self.cache.values):
                tensor[:layers, row, :, max(0, start - reach) : start] = value
                tensor[:layers, row, :, end : end + reach] = value

    def calls(self, attend: Callable[..., object], **options: object) -> list[Callable]:
        """Calls of `attend` with the arguments of `ragged_attention`, one per layer; `options`
        override."""
        bounds = {"max_query_length": max(self.query_lengths), "max_length": max(self.lengths)}
        if self.window is not None:
            bounds["window"] = self.window
        return [
            functools.partial(
                attend, self.query, *self.cache.layer(layer), self.cu_seqlens, *self.index,
                **bounds | options,
            )
            for layer in range(self.layers)
        ]  # fmt: skip

    def row(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Valid keys and values of a row, `[kv heads, length, head_dim]`."""
        start, length = self.starts[row], self.lengths[row]
        keys, values = self.cache.layer(layer)
        return keys[row, :, start : start + length], values[row, :, start : start + length]

    @functools.cached_property
    def _gate(self) -> tuple[list[int], Accuracy]:
        """Query tokens to check, and the accuracy that their attention must have."""
        tokens, seen = [], []
        bounds = self.cu_seqlens.tolist()
        rows = list(enumerate(zip(self.query_lengths, self.lengths, strict=True)))
        for row, (count, length) in rows[:: -(-len(rows) // CHECKED_ROWS)]:
            step = max(1, (count - 1) // (CHECKED - 1))
            for offset in sorted({*range(0, count, step), count - 1}):
                tokens.append(bounds[row] + offset)
                seen.append((row, length - count + offset + 1))
        group = self.heads.query // self.heads.kv

        # The formula in one dtype; grouped, because the reference's repeated keys in float64 exceed
        # the memory of a small machine.
        def attention(query: torch.Tensor) -> torch.Tensor:
            outs = []
            for token, (row, length) in zip(query, seen, strict=True):
                first = 0 if self.window is None else max(0, length - self.window)
                key, value = (x[:, first:length].to(query.dtype) for x in self.row(0, row))
                folded = token.view(self.heads.kv, group, -1)
                scores = folded @ key.transpose(1, 2) * self.heads.dim**-0.5
                outs.append((scores.softmax(-1) @ value).flatten(0, 1))
            return torch.stack(outs)

        return tokens, Accuracy(attention, self.query[tokens])

    def check(self, result: object) -> None:
        """Checks that the packed output is as accurate as plain torch in this dtype, within a
        factor of 2.

        Raises:
            AssertionError: It is not.
        """
        tokens, accuracy = self._gate
        out = result[0] if isinstance(result, tuple) else result
        accuracy.check(out.reshape(self.query.shape)[tokens])
