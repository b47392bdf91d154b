"""rms_norm in Triton: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import Checker, as_rows
from baton_kernels.ops.rms_norm import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, widen

# Up to this many elements a row stays in registers between the sum of squares and the result:
# 8 warps then hold 32 elements per thread.
MAX_BLOCK = 8192


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`baton_kernels.rms_norm` in Triton."""
    if residual is None:
        return run(as_rows(x), weight, eps).view(x.shape)
    if x.dim() > 0 and residual.shape != x.shape:
        Checker("rms_norm").fail("residual", f"of shape {list(x.shape)}", list(residual.shape))
    y, total = run_residual(as_rows(x), weight, eps, as_rows(residual))
    assert total is not None
    return y.view(x.shape), total.view(x.shape)


def run(x, weight, eps) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.rms_norm."""
    y, _ = run_residual(x, weight, eps, None)
    return y


def run_residual(x, weight, eps, residual) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the same as torch.ops.baton_kernels.rms_norm.residual; no sum without residual."""
    check_arguments(x, weight, eps, residual)
    common.require_gpu("rms_norm", "x", x)
    rows, size = x.shape
    y = x.new_empty((rows, size))
    total = None if residual is None else x.new_empty((rows, size))
    x = _uniform(x)
    residual = None if residual is None else _uniform(residual)
    block = min(common.power_of_2(size), MAX_BLOCK)
    common.launch(
        rms_norm_kernel, rows, x.device,
        x, residual, weight, y, total,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
    return y, total


def _uniform(x: torch.Tensor) -> torch.Tensor:
    """x aligned for vector loads exactly when its size is.

    The compiler chooses which thread holds which element, and with it the order of summation, by
    what it knows of the alignment. This makes it depend on the size only.
    """
    is_aligned = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    if is_aligned == (x.shape[1] % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@triton.jit
def _total(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL: tl.constexpr, x_at, residual_at):
    s = widen(tl.load(x_ptr + x_at + at, mask=mask, other=0.0))
    if HAS_RESIDUAL:
        s += widen(tl.load(residual_ptr + residual_at + at, mask=mask, other=0.0))
        # The sum is what the next layer adds to: it is normalized as it is stored.
        s = widen(narrow(s, x_ptr.dtype.element_ty))
    return s


@triton.jit
def rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr,  # [rows, SIZE]; weight [SIZE]
    x_row_stride, residual_row_stride, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x_at = row * x_row_stride
    residual_at = row * residual_row_stride
    y_at = row * SIZE
    lane = tl.arange(0, BLOCK)

    squares = tl.zeros([BLOCK], tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for begin in tl.static_range(0, SIZE, BLOCK):
        at = begin + lane
        mask = at < SIZE
        s = _total(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL, x_at, residual_at)
        if HAS_RESIDUAL:
            tl.store(sum_ptr + y_at + at, narrow(s, dtype), mask=mask)
        squares = tl.fma(s, s, squares)
    inverse = tl.rsqrt(tl.sum(squares, 0) / SIZE + eps)
    for begin in tl.static_range(0, SIZE, BLOCK):
        at = begin + lane
        mask = at < SIZE
        if SIZE > BLOCK:
            s = _total(x_ptr, residual_ptr, at, mask, HAS_RESIDUAL, x_at, residual_at)
        y = s * inverse * widen(tl.load(weight_ptr + at, mask=mask, other=0.0))
        tl.store(y_ptr + y_at + at, narrow(y, dtype), mask=mask)
