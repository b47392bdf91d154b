"""Decode attention with 8-bit keys and values, compared with bfloat16 ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

from baton_kernels import KVCache, ragged_attention

from .attention_cases import LLAMA, SMOLLM2, decode_lengths, limit, ours
from .attention_work import AttentionWork, Heads
from .measure import OURS, Row, Way, Work
from .options import Options
from .report import dtype_name

SHAPES = {
    "32 rows of 128..2048": (LLAMA, decode_lengths(32, 128, 2048, 686)),
    "1 row of 32k": (LLAMA, [32768]),
    "32 rows, MHA 12/12 x 64": (Heads(12, 12, 64), decode_lengths(32, 128, 2048, 686)),
    "32 rows, GQA 9/3 x 64": (SMOLLM2, decode_lengths(32, 128, 2048, 686)),
}
STORED = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


class EightBitWork(AttentionWork):
    """A work with quantized rows; the expected result is that of the dequantized elements."""

    def __init__(self, work: AttentionWork, stored: torch.dtype):
        # The same query and index tensors; as there, the rows of all layers are copies.
        self.__dict__.update({name: value for name, value in vars(work).items() if name != "_gate"})
        heads = work.heads
        self.cache = KVCache(
            work.layers, len(work.lengths), heads.kv, work.capacity, heads.dim, dtype=stored
        )
        for row in range(len(work.lengths)):
            key, value = (
                x.transpose(0, 1)[None].expand(work.layers, -1, -1, -1) for x in work.row(0, row)
            )
            self.cache.insert(key, value, row)
        self._finite = False

    def poison_padding(self) -> None:
        """The columns around a row have never been written; here their scales are poisoned."""
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for scales in (self.cache.key_scales, self.cache.value_scales):
                assert scales is not None
                scales[:, row, :, :start] = float("nan")
                scales[:, row, :, start + length :] = float("nan")

    def calls(self, attend: Callable[..., object], **options: object) -> list[Callable]:
        """`AttentionWork.calls` with the scales."""
        calls = super().calls(attend, **options)
        return [
            functools.partial(call, **self.cache.scales(layer)) for layer, call in enumerate(calls)
        ]

    def row(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The dequantized elements of a row, `[kv heads, length, head_dim]`."""
        key, value = self.cache.extract(row, dtype=torch.float32)
        return key[layer].transpose(0, 1), value[layer].transpose(0, 1)


def eight_bit(options: Options) -> Iterator[Work]:
    """One decoded token per row: 8-bit keys and values, compared with the query's dtype."""
    if options.device.name != "cpu":
        return
    for dtype in options.dtypes:
        for label, (heads, lengths) in SHAPES.items():
            if options.only not in label:
                continue
            if options.tiny:
                lengths = [max(1, length // 128) for length in lengths[:4]]
            work = AttentionWork(
                heads, [1] * len(lengths), lengths, dtype=dtype, device=options.device
            )
            ways = [ours(work, dtype_name(dtype))]
            for name, stored in STORED.items():
                eight = EightBitWork(work, stored)
                calls = eight.calls(ragged_attention)
                ways.append(Way(name, calls, eight.check, OURS, eight.poison_padding))
            ways += options.peers(lambda w=work: options.vllm.ways(w, options.effort))
            yield Work(
                label, dtype_name(dtype), [*ways, *limit(options, work.bytes)],
                bytes=work.bytes, ceiling="read",
            )  # fmt: skip


def eight_bit_summary(rows: list[Row]) -> list[str]:
    """The speed-up over the query's dtype."""
    return [
        f"{row.dtype}, {row.work}: {row.dtype} / {row.way} = {1 / row.ratio:.2f}"
        for row in rows
        if row.way in STORED and row.ratio
    ]
