"""Prefill, chunks of it, and batches that mix it with decoding."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from . import cuda_peers
from .attention_cases import LLAMA, SMOLLM2, decode_lengths, ours
from .attention_work import AttentionWork
from .measure import OURS, Row, Way, Work
from .options import Options
from .report import dtype_name


def prefill(options: Options) -> Iterator[Work]:
    """Whole prefills: TFLOP/s of the visible scores, compared with the rate of matrix products."""
    for dtype in options.dtypes:
        for heads in (LLAMA, SMOLLM2):
            for tokens in options.pick((512, 2048, 4096), (512, 2048), (24,)):
                work = AttentionWork(heads, [tokens], [tokens], dtype=dtype, device=options.device)
                ways = [ours(work), *options.peers(lambda w=work: prefill_peers(w, options))]
                yield Work(
                    f"{tokens} tokens, {heads}", dtype_name(dtype), ways,
                    flops=work.flops, ceiling=f"gemm_{dtype_name(dtype)}",
                )  # fmt: skip


def prefill_peers(work: AttentionWork, options: Options) -> list[Way]:
    """torch's causal attention, with shared heads and with heads repeated beforehand; vLLM's."""
    group = work.heads.query // work.heads.kv
    query = work.query.transpose(0, 1)[None]

    def attend(key: torch.Tensor, value: torch.Tensor, gqa: bool) -> torch.Tensor:
        return sdpa(query, key, value, is_causal=True, enable_gqa=gqa).transpose(1, 2)

    shared, repeated = [], []
    for layer in range(work.layers):
        pair = [x[None] for x in work.row(layer, 0)]
        shared.append(functools.partial(attend, *pair, True))
        whole = [x.repeat_interleave(group, 1) for x in pair]
        repeated.append(functools.partial(attend, *whole, False))
    ways = [
        Way("SDPA causal, enable_gqa", shared, work.check),
        Way("SDPA causal, heads repeated", repeated, work.check),
    ]
    if options.device.name == "cuda":
        return [*ways, *cuda_peers.prefill_peers(work)]
    return [*ways, *options.vllm.ways(work, options.effort)]


def chunk(options: Options) -> Iterator[Work]:
    """A chunk at the end of a long prompt, compared with the whole prefill: time per score."""
    whole, last = options.pick((4096, 256), (2048, 256), (24, 6))
    for dtype in options.dtypes:
        for heads in (LLAMA, SMOLLM2):
            works = [
                AttentionWork(heads, [tokens], [whole], dtype=dtype, device=options.device)
                for tokens in (last, whole)
            ]
            ways = [ours(work, f"{work.query_lengths[0]} tokens") for work in works]
            yield Work(
                f"the last {last} and all of {whole}, {heads}", dtype_name(dtype), ways,
                values={way.name: work.pairs for way, work in zip(ways, works, strict=True)},
            )  # fmt: skip


def chunk_summary(rows: list[Row]) -> list[str]:
    """Nanoseconds per score of each, and their ratio."""
    lines = []
    for part, whole in zip(rows[::2], rows[1::2], strict=True):
        if part.median_us and whole.median_us:
            each = [1e3 * row.median_us / row.values[row.way] for row in (part, whole)]
            lines.append(
                f"{part.dtype}, {part.work}: {each[0]:.3f} ns per score against {each[1]:.3f}, "
                f"{each[0] / each[1]:.2f}x"
            )
    return lines


def mixed(options: Options) -> Iterator[Work]:
    """30 decodes and one prefill of 512 in one call, compared with two separate calls."""
    decodes = [*options.pick(decode_lengths(30, 128, 2048, 686), None, [3, 9])]
    tokens = options.pick(512, 512, 8)
    batches = {
        "mixed": ([1] * len(decodes) + [tokens], [*decodes, tokens]),
        "decodes": ([1] * len(decodes), decodes),
        "prefill": ([tokens], [tokens]),
    }
    for dtype in options.dtypes:
        for heads in (LLAMA, SMOLLM2):
            works = {
                name: AttentionWork(heads, *lengths, dtype=dtype, device=options.device)
                for name, lengths in batches.items()
            }
            ways = [ours(work, name) for name, work in works.items()]
            yield Work(
                f"{len(decodes)} decodes and {tokens} tokens, {heads}", dtype_name(dtype), ways
            )


def mixed_summary(rows: list[Row]) -> list[str]:
    """The mixed batch as a share of the sum of its parts."""
    lines = []
    for whole, *parts in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        if whole.kind == OURS and all(row.median_us for row in (whole, *parts)):
            ratio = whole.median_us / sum(row.median_us for row in parts)
            lines.append(f"{whole.dtype}, {whole.work}: {ratio:.3f} of the sum of the parts")
    return lines
