"""Places of tokens in a cache and in packed tensors, shared by insert, extract and append."""

import triton
import triton.language as tl

# Bounds of queries that a program looks at together.
BLOCK_QUERIES = tl.constexpr(128)


@triton.jit
def count_descents(cu_seqlens_ptr, num_queries):
    """How many bounds of queries are below the one before. Where any is, tokens belong to several
    queries or to none, and no query is whole."""
    descents = tl.zeros([BLOCK_QUERIES], tl.int32)
    for first in range(0, num_queries, BLOCK_QUERIES):
        query = first + tl.arange(0, BLOCK_QUERIES)
        begins = tl.load(cu_seqlens_ptr + query, mask=query < num_queries, other=0)
        ends = tl.load(cu_seqlens_ptr + query + 1, mask=query < num_queries, other=0)
        descents += (begins > ends).to(tl.int32)
    return tl.sum(descents, 0)


@triton.jit
def locate_tokens(
    token, total_tokens, cu_seqlens_ptr, slots_ptr, starts_ptr, num_queries, search_steps,
    num_slots, capacity,
):  # fmt: skip
    """Slot and column (int64) of each token, and which tokens have a place.

    cu_seqlens is on the device, so which query a token belongs to is found there: the last one that
    begins at or before it, by bisection. A query has places for all of its tokens or for none: none
    where an index value is out of range or bounds do not ascend.
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
    has_place = (first >= 0) & (first <= token) & (token < last) & (last <= total_tokens)
    has_place &= (slot >= 0) & (slot < num_slots) & (start >= 0)
    has_place &= start + (last - first) <= capacity
    has_place &= tl.zeros_like(token) + count_descents(cu_seqlens_ptr, num_queries) == 0
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
