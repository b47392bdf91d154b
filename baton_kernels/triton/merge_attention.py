"""merge_attention in Triton: one program per block of (query, head) pairs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.merge_attention import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, widen

BLOCK_PAIRS = 16


def merge_attention(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`baton_kernels.merge_attention` in Triton."""
    return run(out_a, lse_a, out_b, lse_b)


def run(out_a, lse_a, out_b, lse_b) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same as torch.ops.baton_kernels.merge_attention."""
    check_arguments(out_a, lse_a, out_b, lse_b)
    common.require_gpu("merge_attention", "out_a", out_a)
    num_queries, num_heads, head_dim = out_a.shape
    out, lse = out_a.new_empty(out_a.shape), torch.empty_like(lse_a)
    pairs = num_queries * num_heads
    block_d = common.power_of_2(max(head_dim, 1))
    common.launch(
        merge_attention_kernel, common.ceil_div(pairs, BLOCK_PAIRS), out.device,
        out_a, lse_a, out_b, lse_b, out, lse, pairs, num_heads,
        *out_a.stride()[:2], *out_b.stride()[:2],
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_PAIRS=BLOCK_PAIRS,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["pairs"])
def merge_attention_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr,  # [queries, heads(, HEAD_DIM)]
    pairs, num_heads, a_query_stride, a_head_stride, b_query_stride, b_head_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)
    is_pair = pair < pairs
    query = pair // num_heads
    head = pair % num_heads
    d = tl.arange(0, BLOCK_D)
    lse_a = tl.load(lse_a_ptr + pair, mask=is_pair, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + pair, mask=is_pair, other=float("-inf"))
    peak = tl.maximum(lse_a, lse_b)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weight_a = tl.exp(lse_a - base)
    weight_b = tl.exp(lse_b - base)
    total = weight_a + weight_b
    inverse = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    # A side without weight is not read: what it holds may be anything.
    in_head = (d < HEAD_DIM)[None, :]
    a_at = (query * a_query_stride + head * a_head_stride)[:, None] + d[None, :]
    b_at = (query * b_query_stride + head * b_head_stride)[:, None] + d[None, :]
    a = tl.load(out_a_ptr + a_at, mask=(weight_a > 0.0)[:, None] & in_head, other=0.0)
    b = tl.load(out_b_ptr + b_at, mask=(weight_b > 0.0)[:, None] & in_head, other=0.0)
    out = widen(a) * (weight_a * inverse)[:, None] + widen(b) * (weight_b * inverse)[:, None]
    to = pair[:, None] * HEAD_DIM + d[None, :]
    out = narrow(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + to, out, mask=is_pair[:, None] & in_head)
    lse = tl.where(total > 0.0, base + tl.log(tl.where(total > 0.0, total, 1.0)), peak)
    tl.store(lse_ptr + pair, lse, mask=is_pair)
