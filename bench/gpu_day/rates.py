"""The device's highest rates: reading, copying, matrix products, launches."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from ..kernels.cuda import readers
from .device import Stage
from .timing import Replay

READ_BYTES = 4 << 30


def words(stage: Stage) -> torch.Tensor:
    """Random int32 numbers, many times as large as the L2 cache."""
    count = stage.pick(READ_BYTES, 8 << 20) // 4
    return torch.empty(count, dtype=torch.int32, device=stage.device).random_()


def median_seconds(stage: Stage, call: Callable[[], object], repeats: int = 5) -> float:
    replay = Replay([call], stage.device)
    replay.seconds()
    return sorted(replay.seconds() for _ in range(repeats))[repeats // 2]


def read_rate(stage: Stage, source: torch.Tensor | None = None) -> tuple[float, str]:
    """Bytes per second of the fastest way to read, and the name of that way."""
    source = words(stage) if source is None else source
    took = {
        name: median_seconds(stage, functools.partial(read, source))
        for name, read in readers().items()
    }
    best = min(took, key=took.get)
    return source.nbytes / took[best], best


def rates(stage: Stage) -> dict[str, Any]:
    """Rates in GB/s and TFLOP/s, launches in microseconds."""
    source = words(stage)
    read, how = read_rate(stage, source)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_seconds(stage, functools.partial(target.copy_, source))
    del target, source
    n = stage.pick(8192, 128)
    a, b = (torch.randn(n, n, device=stage.device, dtype=stage.dtype) for _ in range(2))
    gemm = 2 * n**3 / median_seconds(stage, lambda: a @ b)
    tiny = torch.zeros(1, device=stage.device)
    node = Replay([tiny.zero_] * 256, stage.device)
    node.seconds()
    return {
        "read_gb_per_s": read / 1e9,
        "read_by": how,
        "copy_gb_per_s": copy / 1e9,
        "gemm_tflop_per_s": gemm / 1e12,
        "graph_node_us": 1e6 * min(node.seconds() for _ in range(5)),
        "launch_us": 1e6 * launch_seconds(stage, tiny),
    }


def launch_seconds(stage: Stage, tiny: torch.Tensor) -> float:
    """The host's time for one launch that computes almost nothing."""
    stage.synchronize()
    begin = time.perf_counter()
    for _ in range(200):
        tiny.zero_()
    seconds = time.perf_counter() - begin
    stage.synchronize()
    return seconds / 200
