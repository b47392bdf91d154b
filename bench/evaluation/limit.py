"""The limit: how long the same tokens take on this machine if nothing is ever idle.

Two ceilings are measured in the same run: the rate of a large matrix product (flop/s) and the rate
at which memory is read (bytes/s). A prompt token costs its projections and its attention at the
first rate. A decode step costs the longer of two times: the arithmetic of its tokens, or reading
all weights once and every token's keys and values once. Everything else (norms, sampling, Python,
cache writes, waiting) counts as zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import baton_kernels

from ..kernels.cuda import readers
from ..workloads import Request

GEMM_SIZE = 1536
READ_BYTES = 512 << 20


@dataclass(frozen=True)
class Ceiling:
    """The highest rates of the machine, with torch's current number of threads.

    Attributes:
        flops: floating-point operations per second of a large matrix product.
        read_bytes: bytes per second at which a long tensor is read.
    """

    flops: float
    read_bytes: float

    def best(self, other: Ceiling) -> Ceiling:
        """The higher of each rate: a single measurement of a busy machine is not a ceiling."""
        return Ceiling(max(self.flops, other.flops), max(self.read_bytes, other.read_bytes))


@dataclass(frozen=True)
class Sizes:
    """The costs of a model.

    Attributes:
        token_flops: one token's projections in all layers.
        logits_flops: the logits of one token.
        pair_flops: one token's attention to one cached token, in all layers.
        weight_bytes: all weights that a forward reads.
        kv_bytes: one cached token's keys and values, in all layers.
    """

    token_flops: float
    logits_flops: float
    pair_flops: float
    weight_bytes: float
    kv_bytes: float

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Sizes:
        """The costs of a Llama with this config."""
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        layer = config.hidden_size * head_dim * (2 * heads + 2 * kv_heads)
        layer += 3 * config.hidden_size * config.intermediate_size
        layers, head = config.num_hidden_layers, config.hidden_size * config.vocab_size
        return cls(
            token_flops=2.0 * layers * layer,
            logits_flops=2.0 * head,
            pair_flops=4.0 * layers * heads * head_dim,
            weight_bytes=float(dtype.itemsize * (layers * layer + head)),
            kv_bytes=float(dtype.itemsize * 2 * layers * kv_heads * head_dim),
        )


def measure_ceiling(dtype: torch.dtype, repeats: int = 5, device: str = "cpu") -> Ceiling:
    """The better of torch and this package for a large product, and of two ways to read memory."""
    if device != "cpu":
        return _gpu_ceiling(dtype, repeats, device)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    product = min(
        _fastest(lambda: a @ b, repeats), _fastest(lambda: baton_kernels.linear(a, b), repeats)
    )
    long = torch.ones(READ_BYTES // 4)
    read = min(_fastest(long.sum, repeats), _fastest(lambda: torch.dot(long, long), repeats))
    return Ceiling(2.0 * GEMM_SIZE**3 / product, long.nbytes / read)


def _gpu_ceiling(dtype: torch.dtype, repeats: int, device: str) -> Ceiling:
    """The ceiling of a GPU, with sizes that fill it; the host waits for each call."""
    size = 4 * GEMM_SIZE
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    words = torch.empty(8 * READ_BYTES // 4, dtype=torch.int32, device=device).random_()

    def waited(call: Callable[[], object]) -> float:
        def wait() -> None:
            call()
            torch.cuda.synchronize(device)

        return _fastest(wait, repeats)

    read = min(waited(lambda read=read: read(words)) for read in readers().values())
    return Ceiling(2.0 * size**3 / waited(lambda: a @ b), words.nbytes / read)


def work_seconds(
    requests: Sequence[Request], sizes: Sizes, ceiling: Ceiling, slots: int, steps: int = 0
) -> float:
    """Seconds for the tokens of these requests, all of which are submitted at the beginning.

    Args:
        requests: prompts and outputs.
        sizes: of the model.
        ceiling: of the machine.
        slots: the most queries that decode in one step.
        steps: decode steps; default: the fewest possible. Each reads the weights once.
    """
    prompts = [request.prompt_tokens for request in requests]
    # A query's first token comes from its prefill, each of the others from a decode step.
    decodes = [request.output_tokens - 1 for request in requests]
    if not steps:
        steps = max(math.ceil(sum(decodes) / slots), max(decodes))
    prefill = sum(
        n * sizes.token_flops + n * (n + 1) / 2 * sizes.pair_flops + sizes.logits_flops
        for n in prompts
    )
    # Token i after the prompt attends to the prompt and to i + 1 later tokens, including itself.
    pairs = sum(d * n + d * (d + 1) / 2 for n, d in zip(prompts, decodes, strict=True))
    arithmetic = sum(decodes) * (sizes.token_flops + sizes.logits_flops) + pairs * sizes.pair_flops
    reading = steps * sizes.weight_bytes + pairs * sizes.kv_bytes
    return prefill / ceiling.flops + max(arithmetic / ceiling.flops, reading / ceiling.read_bytes)


def limit_seconds(requests: Sequence[Request], sizes: Sizes, ceiling: Ceiling, slots: int) -> float:
    """The least time from the first arrival to the last token.

    No request can begin before it arrives. So consider, for each request, it and all later ones,
    computed from its arrival on with nothing idle: the latest of these ends is the bound.
    """
    ordered = sorted(requests, key=lambda request: request.arrival_seconds)
    return max(
        ordered[i].arrival_seconds + work_seconds(ordered[i:], sizes, ceiling, slots)
        for i in range(len(ordered))
        if i == 0 or ordered[i].arrival_seconds > ordered[i - 1].arrival_seconds
    )


def _fastest(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return min(times)
