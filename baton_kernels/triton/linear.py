"""linear in Triton: one tile shape for every number of rows, so that no bit depends on it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.linear import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, operand, widen

# Rows are few in decode, the usual caller: 16 fill one tensor core instruction. A product of many
# rows reads the weights once per 32 of them; a taller tile would multiply a decode's zeros.
BLOCK_ROWS, BLOCK_OUT, BLOCK_IN, SHORT_BLOCK_IN = 32, 64, 32, 16


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`baton_kernels.linear` in Triton."""
    return run(x, weight, bias)


def run(x, weight, bias=None) -> torch.Tensor:
    """With the result of torch.ops.baton_kernels.linear."""
    check_arguments(x, weight, bias)
    common.require_gpu("linear", "x", x)
    rows, in_features = x.shape
    out_features = weight.shape[0]
    y = x.new_empty((rows, out_features))
    # Without tensor cores both factors pass through registers: a shorter step fits in them.
    in_registers = x.element_size() == 4 or common.dot_units(x.device) == "none"
    block_in = SHORT_BLOCK_IN if in_registers else BLOCK_IN
    common.launch(
        linear_kernel,
        common.ceil_div(rows, BLOCK_ROWS) * common.ceil_div(out_features, BLOCK_OUT), x.device,
        x, weight, bias, y, rows, out_features, in_features, x.stride(0), weight.stride(0),
        BLOCK_ROWS=BLOCK_ROWS, BLOCK_OUT=BLOCK_OUT, BLOCK_IN=block_in, num_stages=3,
    )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,  # [rows, in], [out, in], [out] or None, [rows, out]
    rows, out_features, in_features, x_row_stride, weight_row_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    # Row tiles change fastest: the programs that run at one time share their weights.
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row = (row < rows)[:, None]
    is_out = (out < out_features)[:, None]
    lane = tl.arange(0, BLOCK_IN)
    y = tl.zeros([BLOCK_ROWS, BLOCK_OUT], tl.float32)
    for begin in range(0, in_features, BLOCK_IN):
        at = begin + lane[None, :]
        is_in = at < in_features
        x = tl.load(x_ptr + row[:, None] * x_row_stride + at, mask=is_row & is_in, other=0.0)
        weight = tl.load(
            weight_ptr + out[:, None] * weight_row_stride + at, mask=is_out & is_in, other=0.0
        )
        y = tl.dot(operand(x), tl.trans(operand(weight)), y, input_precision="ieee")
    if bias_ptr is not None:
        y += widen(tl.load(bias_ptr + out, mask=out < out_features, other=0.0))[None, :]
    to = row[:, None] * out_features + out[None, :]
    mask = is_row & (out < out_features)[None, :]
    tl.store(y_ptr + to, narrow(y, y_ptr.dtype.element_ty), mask=mask)
