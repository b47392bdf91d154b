"""append_kv in Triton: one program per row and block of heads, of the query or of the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.append_kv import check_arguments
from baton_kernels.ops.checks import default_slots
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, widen
from baton_kernels.triton.tokens import cache_places, token_places

# 32 heads x 64 numbers of each half: 16-byte accesses, also with 4 warps of 64 threads.
MAX_BLOCK_HEADS = 32


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    *,
    query: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """`baton_kernels.append_kv` in Triton."""
    common.refuse_scales("append_kv", key_scale, value_scale)
    return run_query(key, value, key_cache, value_cache, slots, columns, query, cos, sin)


def run(key, value, key_cache, value_cache, slots, columns, cos=None, sin=None) -> None:
    """Does the same as torch.ops.baton_kernels.append_kv."""
    run_query(key, value, key_cache, value_cache, slots, columns, None, cos, sin)


def run_query(
    key, value, key_cache, value_cache, slots, columns, query, cos=None, sin=None
) -> torch.Tensor | None:
    """Returns the same as torch.ops.baton_kernels.append_kv.query; None without query."""
    check_arguments(key, value, key_cache, value_cache, slots, columns, query, cos, sin)
    common.require_gpu("append_kv", "key", key)
    rows, num_kv_heads, head_dim = key.shape
    slots = default_slots(slots, rows, key.device)
    num_heads = 0 if query is None else query.shape[1]
    rotated = None if query is None else query.new_empty(query.shape)
    block_heads = min(common.power_of_2(max(num_heads, num_kv_heads)), MAX_BLOCK_HEADS)
    query_blocks = common.ceil_div(num_heads, block_heads)
    kv_blocks = common.ceil_div(num_kv_heads, block_heads)
    num_slots, _, capacity, _ = key_cache.shape
    common.launch(
        append_kv_kernel, rows * (query_blocks + kv_blocks), key.device,
        key, value, key_cache, value_cache, query, rotated, slots, columns, cos, sin,
        query_blocks, kv_blocks, num_heads, num_kv_heads, num_slots, capacity,
        *key.stride()[:2], *value.stride()[:2], *((0, 0) if query is None else query.stride()[:2]),
        *key_cache.stride()[:3], *value_cache.stride()[:3],
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0),
        HEAD_DIM=head_dim, BLOCK_HALF=common.power_of_2(head_dim // 2), BLOCK_HEADS=block_heads,
        IS_ROTARY=cos is not None,
        # With one angle per element, the second half has its own.
        SECOND_ANGLE=head_dim // 2 if cos is not None and cos.shape[1] == head_dim else 0,
    )  # fmt: skip
    return rotated


@triton.jit
def _rotated(x_ptr, cos_ptr, sin_ptr, at, d, mask, is_half, IS_ROTARY: tl.constexpr,
             HALF: tl.constexpr, SECOND_ANGLE: tl.constexpr):  # fmt: skip
    """Both halves of x, rotated."""
    x1 = tl.load(x_ptr + at, mask=mask)
    x2 = tl.load(x_ptr + at + HALF, mask=mask)
    if IS_ROTARY:
        cos1 = widen(tl.load(cos_ptr + d, mask=is_half, other=0.0))[None, :]
        sin1 = widen(tl.load(sin_ptr + d, mask=is_half, other=0.0))[None, :]
        cos2 = cos1
        sin2 = sin1
        if SECOND_ANGLE > 0:
            cos2 = widen(tl.load(cos_ptr + SECOND_ANGLE + d, mask=is_half, other=0.0))[None, :]
            sin2 = widen(tl.load(sin_ptr + SECOND_ANGLE + d, mask=is_half, other=0.0))[None, :]
        wide1 = widen(x1)
        wide2 = widen(x2)
        x1 = narrow(wide1 * cos1 - wide2 * sin1, x_ptr.dtype.element_ty)
        x2 = narrow(wide2 * cos2 + wide1 * sin2, x_ptr.dtype.element_ty)
    return x1, x2


@triton.jit(do_not_specialize=["num_slots"])
def append_kv_kernel(
    key_ptr, value_ptr,  # [rows, num_kv_heads, HEAD_DIM]
    key_cache_ptr, value_cache_ptr,  # [num_slots, num_kv_heads, capacity, HEAD_DIM]
    query_ptr, rotated_ptr,  # [rows, num_heads, HEAD_DIM]
    slots_ptr, columns_ptr, cos_ptr, sin_ptr,  # [rows], [rows], [rows, HEAD_DIM or its half]
    query_blocks, kv_blocks, num_heads, num_kv_heads, num_slots, capacity,
    key_row_stride, key_head_stride, value_row_stride, value_head_stride,
    query_row_stride, query_head_stride,
    key_cache_slot_stride, key_cache_head_stride, key_cache_column_stride,
    value_cache_slot_stride, value_cache_head_stride, value_cache_column_stride,
    cos_row_stride, sin_row_stride,
    HEAD_DIM: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    IS_ROTARY: tl.constexpr, SECOND_ANGLE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = HEAD_DIM // 2
    row = (tl.program_id(0) // (query_blocks + kv_blocks)).to(tl.int64)
    block = tl.program_id(0) % (query_blocks + kv_blocks)
    d = tl.arange(0, BLOCK_HALF)
    is_half = d < HALF
    lane = tl.arange(0, BLOCK_HEADS).to(tl.int64)
    if IS_ROTARY:
        cos_ptr += row * cos_row_stride
        sin_ptr += row * sin_row_stride

    if block < query_blocks:
        if query_ptr is not None:
            head = block * BLOCK_HEADS + lane
            mask = (head < num_heads)[:, None] & is_half[None, :]
            at = token_places(0, row, head, d, 0, query_row_stride, query_head_stride)
            x1, x2 = _rotated(
                query_ptr, cos_ptr, sin_ptr, at, d, mask, is_half, IS_ROTARY, HALF, SECOND_ANGLE
            )
            to = (row * num_heads + head[:, None]) * HEAD_DIM + d[None, :]
            tl.store(rotated_ptr + to, x1, mask=mask)
            tl.store(rotated_ptr + to + HALF, x2, mask=mask)
    else:
        slot = tl.load(slots_ptr + row).to(tl.int64)
        column = tl.load(columns_ptr + row).to(tl.int64)
        has_place = (slot >= 0) & (slot < num_slots) & (column >= 0) & (column < capacity)
        head = (block - query_blocks) * BLOCK_HEADS + lane
        mask = (head < tl.where(has_place, num_kv_heads, 0))[:, None] & is_half[None, :]
        at = token_places(0, row, head, d, 0, key_row_stride, key_head_stride)
        x1, x2 = _rotated(
            key_ptr, cos_ptr, sin_ptr, at, d, mask, is_half, IS_ROTARY, HALF, SECOND_ANGLE
        )
        to = cache_places(
            0, slot, head, column, d, 0, key_cache_slot_stride, key_cache_head_stride,
            key_cache_column_stride,
        )  # fmt: skip
        tl.store(key_cache_ptr + to, x1, mask=mask)
        tl.store(key_cache_ptr + to + HALF, x2, mask=mask)
        at = token_places(0, row, head, d, 0, value_row_stride, value_head_stride)
        x1 = tl.load(value_ptr + at, mask=mask)
        x2 = tl.load(value_ptr + at + HALF, mask=mask)
        to = cache_places(
            0, slot, head, column, d, 0, value_cache_slot_stride, value_cache_head_stride,
            value_cache_column_stride,
        )  # fmt: skip
        tl.store(value_cache_ptr + to, x1, mask=mask)
        tl.store(value_cache_ptr + to + HALF, x2, mask=mask)
