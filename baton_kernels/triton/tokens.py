"""Where tokens lie in a cache and in packed tensors: what insert, extract and append share."""

import triton
import triton.language as tl


@triton.jit
def locate_tokens(
    token, total_tokens, cu_seqlens_ptr, slots_ptr, starts_ptr, num_queries, search_steps,
    num_slots, capacity,
):  # fmt: skip
    """Slot and column (int64) of each token, and which tokens have a place.

    cu_seqlens is on the device, so which query a token belongs to is found there: the last one that
    begins at or before it, by bisection. Index values out of range give no place.
    """
    low = tl.zeros_like(token)
    high = low + num_queries
    for _ in range(search_steps):
        middle = (low + high) // 2
        begins = tl.load(cu_seqlens_ptr + middle)
        low = tl.where(begins <= token, middle, low)
        high = tl.where(begins <= token, high, middle)
    first = tl.load(cu_seqlens_ptr + low)
    last = tl.load(cu_seqlens_ptr + low + 1)
    slot = tl.load(slots_ptr + low).to(tl.int64)
    start = tl.load(starts_ptr + low).to(tl.int64)
    column = start + (token - first)
    has_place = (token < total_tokens) & (first >= 0) & (first <= token) & (token < last)
    has_place &= (slot >= 0) & (slot < num_slots) & (start >= 0) & (column < capacity)
    return slot, column, has_place


@triton.jit
def split_program(program, num_kv_heads, num_layers):
    """(block, layer, head) of a program, int64; heads change fastest, as they do in memory."""
    head = program % num_kv_heads
    layer = program // num_kv_heads % num_layers
    block = program // num_kv_heads // num_layers
    return block.to(tl.int64), layer.to(tl.int64), head.to(tl.int64)


@triton.jit
def cache_places(
    layer, slot, head, column, d, layer_stride, slot_stride, head_stride, column_stride
):
    """Offsets of elements d of places in a cache, [places, d]: head or column may be a vector."""
    at = layer * layer_stride + head * head_stride
    at += slot * slot_stride + column * column_stride
    return at[:, None] + d[None, :]


@triton.jit
def token_places(layer, token, head, d, layer_stride, token_stride, head_stride):
    """Offsets of elements d of packed tokens, [tokens, d]: head or token may be a vector."""
    at = layer * layer_stride + head * head_stride + token * token_stride
    return at[:, None] + d[None, :]
