"""Shared by all Triton kernels: the launch, and arithmetic that is right on the interpreter too.

The interpreter (TRITON_INTERPRET=1) computes with bfloat16 as with raw 16-bit integers, and cuts
where a GPU rounds: kernels widen to float32 before they compute, and `widen` and `narrow` convert
by bits there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import Checker

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
MAX_PROGRAMS = 2**31 - 1


def refuse_scales(
    op: str, key_scale: torch.Tensor | None, value_scale: torch.Tensor | None
) -> None:
    """Caches of eight bits have scales; these kernels have no code for them."""
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scale is not None:
            expected = "None with the Triton kernels (those of the CPU take eight bits)"
            Checker(op).fail(name, expected, "a tensor", NotImplementedError)


@dataclasses.dataclass
class Launch:
    """One launch of a kernel, as `recording` notes it."""

    kernel: Any
    programs: int
    args: tuple
    constants: dict[str, Any]
    options: dict[str, Any]


_recorded: list[Launch] | None = None
_recorded_units, _recorded_shared = "matrix", 99 << 10


@contextlib.contextmanager
def recording(*, units: str = "matrix", shared: int = 99 << 10) -> Iterator[list[Launch]]:
    """Within the block launches are noted and not run: for compiling them without a GPU.

    Args:
        units: What `dot_units` says of the GPU.
        shared: What `shared_bytes` says of it.
    """
    global _recorded, _recorded_units, _recorded_shared
    before = _recorded, _recorded_units, _recorded_shared
    _recorded, _recorded_units, _recorded_shared = [], units, shared
    try:
        yield _recorded
    finally:
        _recorded, _recorded_units, _recorded_shared = before


def dot_units(device: torch.device) -> str:
    """The kind of unit that multiplies 16-bit tiles on a GPU.

    "matrix": tensor or matrix cores; "rdna": those of AMD's warps of 32 threads, which have 256
    registers and hold a factor twice; "none": no unit that Triton knows how to use (NVIDIA before
    sm_80, whose tensor cores it has no instructions for).
    """
    if _recorded is not None:
        return _recorded_units
    if device.type != "cuda":
        return "matrix"
    if torch.version.hip is not None:
        return "rdna" if torch.cuda.get_device_properties(device).warp_size == 32 else "matrix"
    return "matrix" if torch.cuda.get_device_capability(device) >= (8, 0) else "none"


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have."""
    if _recorded is not None:
        return _recorded_shared
    if device.type != "cuda" or torch.version.hip is not None:
        return 64 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 64 << 10)


def require_gpu(op: str, name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor that no kernel can be launched on."""
    if tensor.device.type == "cpu" and not INTERPRETED.value and _recorded is None:
        expected = "on a GPU (on the CPU Triton kernels are only interpreted, for tests, with "
        Checker(op).fail(name, expected + "TRITON_INTERPRET=1)", "cpu")


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    **constants: Any,
) -> None:
    """Runs `programs` instances of a kernel on the current stream of a device.

    Multiplications and additions are fused where a kernel says so and nowhere else: left to the
    compiler, two variants of one kernel could round differently.
    """
    if programs == 0:
        return
    if programs > MAX_PROGRAMS:
        raise ValueError(f"{kernel.__name__}: {programs} programs exceed {MAX_PROGRAMS}")
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if _recorded is not None:
        _recorded.append(Launch(kernel, programs, args, constants, options))
        return
    with _current(device):
        kernel[(programs,)](*args, **constants, **options)


def _current(device: torch.device) -> contextlib.AbstractContextManager:
    # Triton launches on the current device, even if its tensors are on another.
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).device(device)
    return contextlib.nullcontext()


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return triton.next_power_of_2(n)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def cache_strides(cache: torch.Tensor) -> tuple[int, int, int, int]:
    """Strides of layer, slot, head and column; the layer's is 0 without layers."""
    layer = cache.stride(0) if cache.dim() == 5 else 0
    slot, head, column = cache.stride()[-4:-1]
    return layer, slot, head, column


def token_strides(tokens: torch.Tensor) -> tuple[int, int, int]:
    """Strides of layer, token and head; the layer's is 0 without layers."""
    layer = tokens.stride(0) if tokens.dim() == 4 else 0
    token, head = tokens.stride()[-3:-1]
    return layer, token, head


@triton.jit
def widen(x):
    """x in float32, exactly."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 x in another dtype, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def operand(x):
    """x as tl.dot takes it: as it is, or widened for the interpreter."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return widen(x)
    else:
        return x


@triton.jit
def tanh(x):
    """tanh; near 0 by a polynomial, because 1 - 2 / (exp(2 x) + 1) cancels there."""
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp(2.0 * magnitude) + 1.0)
    square = x * x
    p = tl.fma(square, -5.70498872745e-3, 2.06390887954e-2)
    p = tl.fma(p, square, -5.37397155531e-2)
    p = tl.fma(p, square, 1.33314422036e-1)
    p = tl.fma(p, square, -3.33332819422e-1)
    near = tl.fma(p * square, x, x)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0, -far, far))
