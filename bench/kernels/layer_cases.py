"""Norm, activation and projection."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn import functional

import baton_kernels as bk
from baton_kernels import reference
from baton_kernels.testing import Accuracy

from .measure import LIMIT, OURS, Way, Work, kept
from .options import Options
from .report import dtype_name

# Bytes of one input.
LARGE = 16 << 20
# Calls per timing where a call takes microseconds: enough for the clock's resolution, and few
# enough that an occasional disturbance of the machine affects few timings.
INNER = 20
# hidden and intermediate size
MODELS = {"SmolLM2-135M": (576, 1536), "Llama 8B": (4096, 14336)}


def layers(options: Options) -> Iterator[Work]:
    """rms_norm and silu_and_mul of large inputs, compared with reading and writing the same
    bytes."""
    width = options.pick(4096, 4096, 64)
    for dtype in options.dtypes:
        rows = max(1, options.pick(LARGE, LARGE, 4096) // (width * dtype.itemsize))
        copies = options.pick(-(-4 * options.device.cache_bytes // LARGE) + 1, None, 2)
        inputs = [normal(options, dtype, rows, width, seed=i) for i in range(copies)]
        weight = normal(options, dtype, width, seed=99)
        size = inputs[0].nbytes
        for label, calls, moved in (
            (f"rms_norm, {rows} x {width}", norms(inputs, weight), 2 * size),
            (f"silu_and_mul, {rows} x {width}", activations(inputs), size + size // 2),
        ):
            ways = [*pair(options, *calls), *copies_of(options, moved // 2)]
            # Results are written to existing memory, as with a server's allocator.
            for way in ways:
                for call in way.calls:
                    call()
            yield Work(label, dtype_name(dtype), ways, bytes=moved, ceiling="copy")


def rows(options: Options) -> Iterator[Work]:
    """rms_norm and silu_and_mul of one decode row: microseconds, including the call."""
    for dtype in options.dtypes:
        for model, (hidden, wide) in MODELS.items():
            x, gate = (normal(options, dtype, 1, n) for n in (hidden, 2 * wide))
            weight = normal(options, dtype, hidden, seed=99)
            for op, calls in (
                (f"rms_norm of {hidden}", norms([x], weight)),
                (f"silu_and_mul of 2 x {wide}", activations([gate])),
            ):
                yield Work(f"{op} ({model})", dtype_name(dtype), pair(options, *calls), inner=INNER)


def normal(options: Options, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device=options.device.name, dtype=dtype)


Calls = list[Callable[[], torch.Tensor]]


def norms(inputs: Sequence[torch.Tensor], weight: torch.Tensor) -> tuple[Calls, Calls, Accuracy]:
    """Our calls, torch's, and the required accuracy."""
    size = weight.shape
    return (
        [functools.partial(bk.rms_norm, x, weight, 1e-6) for x in inputs],
        [functools.partial(functional.rms_norm, x, size, weight, 1e-6) for x in inputs],
        Accuracy("rms_norm", inputs[0].cpu(), weight.cpu()),
    )


def activations(inputs: Sequence[torch.Tensor]) -> tuple[Calls, Calls, Accuracy]:
    def with_torch(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return functional.silu(a) * b

    return (
        [functools.partial(bk.silu_and_mul, x) for x in inputs],
        [functools.partial(with_torch, x) for x in inputs],
        Accuracy("silu_and_mul", inputs[0].cpu()),
    )


def pair(options: Options, mine: Calls, others: Calls, truth: Accuracy) -> list[Way]:
    def check(result: torch.Tensor) -> None:
        truth.check(result.cpu())

    ways = [Way("baton_kernels", kept(mine), check, OURS)]
    return [*ways, *options.peers(lambda: [Way("torch", kept(others), check)])]


def copies_of(options: Options, num_bytes: int) -> list[Way]:
    calls = options.device.copiers(num_bytes)
    name = f"{options.device.copier}: the same bytes read and written"
    return [Way(name, calls, kind=LIMIT)] if calls else []


def linear(options: Options) -> Iterator[Work]:
    """linear compared with torch: GB/s of weights for few rows, TFLOP/s for many."""
    for dtype in options.dtypes:
        for model, (hidden, wide) in MODELS.items():
            wide = hidden if model == "Llama 8B" else wide
            outs, ins = options.pick((wide, hidden), None, (24, 16))
            weights = [normal(options, dtype, outs, ins)]
            copies = options.pick(4 * options.device.cache_bytes // weights[0].nbytes + 1, None, 2)
            weights += [weights[0].clone() for _ in range(copies)]
            for count in options.pick((1, 8, 16, 32, 512), None, (1, 3)):
                x = normal(options, dtype, count, ins, seed=1)
                truth = Accuracy(reference.linear, x.cpu(), weights[0].cpu())
                calls = (
                    [functools.partial(bk.linear, x, w) for w in weights],
                    [functools.partial(functional.linear, x, w) for w in weights],
                    truth,
                )
                few = count <= 32
                yield Work(
                    f"{count} rows, {ins} to {outs}", dtype_name(dtype), pair(options, *calls),
                    bytes=weights[0].nbytes if few else 0,
                    flops=0 if few else 2 * count * ins * outs,
                    ceiling="read" if few else f"gemm_{dtype_name(dtype)}",
                )  # fmt: skip
