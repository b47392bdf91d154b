"""silu_and_mul in Triton: one program per block of a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import as_rows
from baton_kernels.ops.silu_and_mul import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, widen

# At least 8 elements per thread of 4 warps, also of 64 threads: 16-byte loads of each half.
MAX_BLOCK = 2048


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """`baton_kernels.silu_and_mul` in Triton."""
    y = run(as_rows(x))
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def run(x) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.silu_and_mul."""
    check_arguments(x)
    common.require_gpu("silu_and_mul", "x", x)
    rows, size = x.shape[0], x.shape[1] // 2
    y = x.new_empty((rows, size))
    block = min(common.power_of_2(max(size, 1)), MAX_BLOCK)
    common.launch(
        silu_and_mul_kernel, rows * common.ceil_div(size, block), x.device,
        x, y, x.stride(0), size, BLOCK=block,
    )  # fmt: skip
    return y


@triton.jit
def silu_and_mul_kernel(x_ptr, y_ptr, x_row_stride, size, BLOCK: tl.constexpr):
    # x_ptr: [rows, 2 * size]; y_ptr: [rows, size]
    blocks = tl.cdiv(size, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    gate = widen(tl.load(x_ptr + row * x_row_stride + at, mask=mask, other=0.0))
    up = widen(tl.load(x_ptr + row * x_row_stride + size + at, mask=mask, other=0.0))
    y = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(y_ptr + row * size + at, narrow(y, y_ptr.dtype.element_ty), mask=mask)
