"""likeliest in Triton: one program per row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.likeliest import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.common import widen

# 16 elements per thread of 8 warps.
MAX_BLOCK = 4096


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """`baton_kernels.likeliest` in Triton."""
    return run(logits)


def run(logits) -> torch.Tensor:
    """With the result of torch.ops.baton_kernels.likeliest."""
    check_arguments(logits)
    common.require_gpu("likeliest", "logits", logits)
    rows, size = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    block = min(common.power_of_2(size), MAX_BLOCK)
    common.launch(
        likeliest_kernel, rows, logits.device,
        logits, tokens, logits.stride(0), size, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return tokens


@triton.jit
def likeliest_kernel(logits_ptr, tokens_ptr, row_stride, size, BLOCK: tl.constexpr):
    # logits_ptr: [rows, size]; tokens_ptr: [rows]
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    is_finite = tl.full([BLOCK], 1, tl.int32)
    for begin in tl.range(0, size, BLOCK):
        at = begin + lane
        mask = at < size
        x = widen(tl.load(logits_ptr + row * row_stride + at, mask=mask, other=0.0))
        # False for NaN too.
        is_finite &= (tl.abs(x) < float("inf")).to(tl.int32)
        is_better = mask & (x > best)
        best = tl.where(is_better, x, best)
        where = tl.where(is_better, at, where)
    # A lane keeps the first of its largest elements; the first of all lanes is the smallest index.
    index = tl.min(tl.where(best == tl.max(best, 0), where, size), 0)
    token = tl.where(tl.min(is_finite, 0) != 0, index, -1)
    tl.store(tokens_ptr + row, token.to(tl.int64))
