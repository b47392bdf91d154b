"""extract_kv in Triton: one program per block of packed tokens, layer and head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import (
    Checker,
    default_cu_seqlens,
    default_slots,
    default_starts,
)
from baton_kernels.ops.extract_kv import check_arguments, check_out_arguments
from baton_kernels.triton import common
from baton_kernels.triton.insert_kv import BLOCK_TOKENS
from baton_kernels.triton.tokens import cache_places, locate_tokens, split_program, token_places


def extract_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    *,
    total_tokens: int,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`baton_kernels.extract_kv` in Triton."""
    common.refuse_scales("extract_kv", key_scale, value_scale)
    if dtype is not None:
        Checker("extract_kv").fail("dtype", "None with a cache of floats", dtype, TypeError)
    arguments = (key_cache, value_cache, cu_seqlens, slots, starts, total_tokens)
    if out is None:
        return run(*arguments)
    run_out(*arguments, *out)
    return out


def run(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens):
    """Returns the same as torch.ops.baton_kernels.extract_kv."""
    check_arguments(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens)
    *layers, _, num_kv_heads, _, head_dim = key_cache.shape
    key = key_cache.new_empty((*layers, total_tokens, num_kv_heads, head_dim))
    value = torch.empty_like(key)
    run_out(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key, value)
    return key, value


def run_out(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key, value) -> None:
    """Does the same as torch.ops.baton_kernels.extract_kv.out."""
    num_queries = check_out_arguments(
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key, value
    )
    cu_seqlens = default_cu_seqlens(cu_seqlens, num_queries, key.device)
    slots = default_slots(slots, num_queries, key.device)
    starts = default_starts(starts, num_queries, key.device)
    common.require_gpu("extract_kv", "key_cache", key_cache)
    num_slots, num_kv_heads, capacity, head_dim = key_cache.shape[-4:]
    num_layers = key_cache.shape[0] if key_cache.dim() == 5 else 1
    blocks = common.ceil_div(total_tokens, BLOCK_TOKENS) if num_queries else 0
    common.launch(
        extract_kv_kernel, blocks * num_layers * num_kv_heads, key.device,
        key, value, key_cache, value_cache, cu_seqlens, slots, starts,
        total_tokens, num_queries, num_queries.bit_length(),
        num_layers, num_kv_heads, num_slots, capacity,
        *common.token_strides(key), *common.token_strides(value),
        *common.cache_strides(key_cache), *common.cache_strides(value_cache),
        HEAD_DIM=head_dim, BLOCK_D=common.power_of_2(head_dim), BLOCK_TOKENS=BLOCK_TOKENS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["total_tokens", "num_queries", "search_steps", "num_slots"])
def extract_kv_kernel(
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
    key_from = cache_places(
        layer, slot, head, column, d, key_cache_layer_stride, key_cache_slot_stride,
        key_cache_head_stride, key_cache_column_stride,
    )  # fmt: skip
    value_from = cache_places(
        layer, slot, head, column, d, value_cache_layer_stride, value_cache_slot_stride,
        value_cache_head_stride, value_cache_column_stride,
    )  # fmt: skip
    key = tl.load(key_cache_ptr + key_from, mask=mask)
    value = tl.load(value_cache_ptr + value_from, mask=mask)
    key_to = token_places(
        layer, token, head, d, key_layer_stride, key_token_stride, key_head_stride
    )  # fmt: skip
    value_to = token_places(
        layer, token, head, d, value_layer_stride, value_token_stride, value_head_stride
    )  # fmt: skip
    tl.store(key_ptr + key_to, key, mask=mask)
    tl.store(value_ptr + value_to, value, mask=mask)
