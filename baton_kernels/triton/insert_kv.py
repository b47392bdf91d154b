"""insert_kv in Triton: one program per block of packed tokens, layer and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import default_cu_seqlens, default_slots, default_starts
from baton_kernels.ops.insert_kv import check_arguments
from baton_kernels.triton import common
from baton_kernels.triton.tokens import (
    cache_places,
    count_descents,
    locate_tokens,
    split_program,
    token_places,
)

# 32 tokens x 128 numbers are 4 16-byte accesses per thread and cache: enough to hide the look-up.
BLOCK_TOKENS = 32


def insert_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    *,
    zero_padding: bool = False,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """`baton_kernels.insert_kv` in Triton."""
    common.refuse_scales("insert_kv", key_scale, value_scale)
    run(
        key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=zero_padding
    )  # fmt: skip


def run(key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=False) -> None:
    """Does the same as torch.ops.baton_kernels.insert_kv."""
    num_queries = check_arguments(
        key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=zero_padding
    )  # fmt: skip
    cu_seqlens = default_cu_seqlens(cu_seqlens, num_queries, key.device)
    slots = default_slots(slots, num_queries, key.device)
    starts = default_starts(starts, num_queries, key.device)
    common.require_gpu("insert_kv", "key", key)
    total_tokens = key.shape[-3]
    num_slots, num_kv_heads, capacity, head_dim = key_cache.shape[-4:]
    num_layers = key_cache.shape[0] if key_cache.dim() == 5 else 1
    planes = num_layers * num_kv_heads
    strides = common.cache_strides(key_cache), common.cache_strides(value_cache)
    if num_queries == 0:
        return
    if zero_padding:
        # The first start is not known to the host: programs beyond it end at once.
        blocks = common.ceil_div(capacity, BLOCK_TOKENS)
        common.launch(
            clear_padding_kernel, num_queries * blocks * planes, key.device,
            key_cache, value_cache, cu_seqlens, slots, starts,
            total_tokens, num_queries, blocks, num_layers, num_kv_heads, num_slots, capacity,
            *strides[0], *strides[1],
            HEAD_DIM=head_dim, BLOCK_D=common.power_of_2(head_dim), BLOCK_TOKENS=BLOCK_TOKENS,
        )  # fmt: skip
    common.launch(
        insert_kv_kernel, common.ceil_div(total_tokens, BLOCK_TOKENS) * planes, key.device,
        key, value, key_cache, value_cache, cu_seqlens, slots, starts,
        total_tokens, num_queries, num_queries.bit_length(),
        num_layers, num_kv_heads, num_slots, capacity,
        *common.token_strides(key), *common.token_strides(value), *strides[0], *strides[1],
        HEAD_DIM=head_dim, BLOCK_D=common.power_of_2(head_dim), BLOCK_TOKENS=BLOCK_TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total_tokens", "num_queries", "search_steps", "num_slots"])
def insert_kv_kernel(
    key_ptr, value_ptr,  # [num_layers, total_tokens, num_kv_heads, HEAD_DIM]
    key_cache_ptr, value_cache_ptr,  # [num_layers, num_slots, num_kv_heads, capacity, HEAD_DIM]
    cu_seqlens_ptr, slots_ptr, starts_ptr,  # [num_queries + 1], [num_queries], [num_queries]
    total_tokens, num_queries, search_steps, num_layers, num_kv_heads, num_slots, capacity,
    key_layer_stride, key_token_stride, key_head_stride,
    value_layer_stride, value_token_stride, value_head_stride,
    key_cache_layer_stride, key_cache_slot_stride, key_cache_head_stride, key_cache_column_stride,
    value_cache_layer_stride, value_cache_slot_stride, value_cache_head_stride,
    value_cache_column_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    block, layer, head = split_program(tl.program_id(0), num_kv_heads, num_layers)
    token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    slot, column, has_place = locate_tokens(
        token, total_tokens, cu_seqlens_ptr, slots_ptr, starts_ptr, num_queries, search_steps,
        num_slots, capacity,
    )  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    mask = has_place[:, None] & (d < HEAD_DIM)[None, :]
    key_from = token_places(
        layer, token, head, d, key_layer_stride, key_token_stride, key_head_stride
    )  # fmt: skip
    value_from = token_places(
        layer, token, head, d, value_layer_stride, value_token_stride, value_head_stride
    )  # fmt: skip
    key = tl.load(key_ptr + key_from, mask=mask)
    value = tl.load(value_ptr + value_from, mask=mask)
    key_to = cache_places(
        layer, slot, head, column, d, key_cache_layer_stride, key_cache_slot_stride,
        key_cache_head_stride, key_cache_column_stride,
    )  # fmt: skip
    value_to = cache_places(
        layer, slot, head, column, d, value_cache_layer_stride, value_cache_slot_stride,
        value_cache_head_stride, value_cache_column_stride,
    )  # fmt: skip
    tl.store(key_cache_ptr + key_to, key, mask=mask)
    tl.store(value_cache_ptr + value_to, value, mask=mask)


@triton.jit(do_not_specialize=["total_tokens", "num_queries", "blocks", "num_slots"])
def clear_padding_kernel(
    key_cache_ptr, value_cache_ptr,  # [num_layers, num_slots, num_kv_heads, capacity, HEAD_DIM]
    cu_seqlens_ptr, slots_ptr, starts_ptr,  # [num_queries + 1], [num_queries], [num_queries]
    total_tokens, num_queries, blocks, num_layers, num_kv_heads, num_slots, capacity,
    key_cache_layer_stride, key_cache_slot_stride, key_cache_head_stride, key_cache_column_stride,
    value_cache_layer_stride, value_cache_slot_stride, value_cache_head_stride,
    value_cache_column_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    block, layer, head = split_program(tl.program_id(0), num_kv_heads, num_layers)
    query = block // blocks
    first = block % blocks * BLOCK_TOKENS
    slot = tl.load(slots_ptr + query).to(tl.int64)
    start = tl.load(starts_ptr + query).to(tl.int64)
    begin = tl.load(cu_seqlens_ptr + query)
    end = tl.load(cu_seqlens_ptr + query + 1)
    if (first >= start) | (slot < 0) | (slot >= num_slots):
        return
    # The padding of a query that is not copied stays as it is.
    if (begin < 0) | (end > total_tokens) | (start + (end - begin) > capacity):
        return
    if count_descents(cu_seqlens_ptr, num_queries) > 0:
        return
    column = first + tl.arange(0, BLOCK_TOKENS)
    d = tl.arange(0, BLOCK_D)
    mask = (column < start)[:, None] & (d < HEAD_DIM)[None, :]
    zeros = tl.zeros([BLOCK_TOKENS, BLOCK_D], key_cache_ptr.dtype.element_ty)
    key_to = cache_places(
        layer, slot, head, column, d, key_cache_layer_stride, key_cache_slot_stride,
        key_cache_head_stride, key_cache_column_stride,
    )  # fmt: skip
    value_to = cache_places(
        layer, slot, head, column, d, value_cache_layer_stride, value_cache_slot_stride,
        value_cache_head_stride, value_cache_column_stride,
    )  # fmt: skip
    tl.store(key_cache_ptr + key_to, zeros, mask=mask)
    tl.store(value_cache_ptr + value_to, zeros, mask=mask)
