"""masked_softmax in Triton: one program per query and head; the mask exists in registers only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import default_starts
from baton_kernels.ops.masked_softmax import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.attention_mask import visible_columns
from baton_kernels.triton.common import narrow, widen

# 8 elements per thread of 4 warps of 64: 16-byte accesses on AMD as well.
BLOCK = 2048
LOG2_E = tl.constexpr(1.4426950408889634)


def masked_softmax(
    scores: torch.Tensor,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int | None = None,
) -> torch.Tensor:
    """`baton_kernels.masked_softmax` in Triton."""
    return run(scores, starts, lengths, scale, window)


def run(scores, starts, lengths, scale=1.0, window=None) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.masked_softmax."""
    check_arguments(scores, starts, lengths, scale, window)
    common.require_gpu("masked_softmax", "scores", scores)
    rows, num_heads, query_length, key_length = scores.shape
    starts = default_starts(starts, rows, scores.device)
    weights = scores.new_empty(scores.shape)
    common.launch(
        masked_softmax_kernel, rows * num_heads * query_length if key_length else 0, scores.device,
        scores, weights, starts, lengths, num_heads, query_length, key_length,
        *scores.stride()[:3], scale, window or 0,
        HAS_WINDOW=window is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return weights


@triton.jit(do_not_specialize=["query_length", "window"])
def masked_softmax_kernel(
    scores_ptr, weights_ptr, starts_ptr, lengths_ptr,  # [rows, heads, queries, keys], [rows]
    num_heads, query_length, key_length, row_stride, head_stride, query_stride, scale, window,
    HAS_WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    query = line % query_length
    row = line // query_length // num_heads
    head = line // query_length % num_heads
    scores_ptr += row * row_stride + head * head_stride + query * query_stride
    weights_ptr += line * key_length
    start = tl.load(starts_ptr + row)
    length = tl.load(lengths_ptr + row)
    first, last = visible_columns(start, length, query, query_length, window, HAS_WINDOW)
    # Index values are not checked on a GPU: nothing outside the line is read.
    first = tl.minimum(tl.maximum(first, 0), key_length).to(tl.int32)
    end = tl.minimum(tl.maximum(last + 1, 0), key_length).to(tl.int32)
    lane = tl.arange(0, BLOCK)

    # Lanes count from the first visible column, not from column 0: the order of summation, and
    # with it every bit, is then the same wherever the row starts.
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(first, end, BLOCK):
        column = begin + lane
        score = widen(tl.load(scores_ptr + column, mask=column < end, other=float("-inf")))
        score = tl.where(column < end, score * scale * LOG2_E, float("-inf"))
        higher = tl.maximum(peak, score)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = tl.fma(total, tl.exp2(peak - base), tl.exp2(score - base))
        peak = higher
    top = tl.max(peak, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(total * tl.exp2(peak - base), 0)
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))

    for begin in range(0, key_length, BLOCK):
        column = begin + lane
        visible = (column >= first) & (column < end)
        # A block with a visible column is loaded whole, by vectors; one without is not loaded.
        is_read = (begin < end) & (begin + BLOCK > first)
        limit = tl.where(is_read, key_length, 0)
        score = widen(tl.load(scores_ptr + column, mask=column < limit, other=0.0))
        weight = tl.exp2(score * scale * LOG2_E - base) * inverse
        weight = narrow(tl.where(visible, weight, 0.0), weights_ptr.dtype.element_ty)
        tl.store(weights_ptr + column, weight, mask=column < key_length)
