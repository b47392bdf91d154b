"""insert_kv: write prefilled queries into slots of a KV cache."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call, count_packed_rows

_native = ops.insert_kv.default


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
) -> None:
    """Writes the keys and values of prefilled queries into their slots, all layers in one call.

    For query i and its token t::

        key_cache[slots[i], :, starts[i] + t] = key[cu_seqlens[i] + t]

    and value likewise. Two queries of 2 and 3 tokens, into slots 3 and 0 of an aligned shape that
    ends in column 4 (`.` stays as it is)::

        key    a0 a1 b0 b1 b2      slot 0   .  b0 b1 b2  .       starts = [2, 1]
                                   slot 3   .  .  a0 a1  .       cu_seqlens = [0, 2, 5]

    Args:
        key: Packed keys, `[total_tokens, num_kv_heads, head_dim]`, float32, float16 or bfloat16,
            last dimension contiguous. With caches of all layers: a leading num_layers.
        value: As key.
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, last dimension contiguous, or
            with a leading num_layers. Written.
        value_cache: As key_cache. Written.
        cu_seqlens: `[num_queries + 1]`, int32: where each query's tokens begin, from 0 to
            total_tokens; if None, each query has one.
        slots: `[num_queries]`, int32: the slot of each query; query i in slot i if None.
        starts: `[num_queries]`, int32: the column of each query's first token; 0 if None.
        zero_padding: Also clear columns `[0, starts[i])`, for consumers that multiply padding.

    Raises:
        ValueError: A shape, stride, device or index value does not fit, two queries' targets
            overlap (columns that zero_padding clears included), or a cache shares memory with
            another argument. Nothing is written then.
        TypeError: A dtype is not supported, or differs between tensors of the cache's dtype.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256.

    On a GPU index values are not checked; out of range they are skipped, and the result of
    overlapping targets is undefined.

    Source: BATON (arXiv 2410.18701), embedding of prefilled keys and values in the running batch.
    """
    call(
        "insert_kv", _native, check_arguments,
        key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding,
    )  # fmt: skip


def check_arguments(
    key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=False
) -> int:
    """The number of queries, when the arguments fit."""
    check = Checker("insert_kv")
    check.caches(key_cache, value_cache, with_layers=True, written=True)
    check.floating("key", key)
    check.tokens("key", key, key_cache)
    check.tokens("value", value, key_cache)
    check.shape("value", value, key.shape)
    total_tokens, device = key.shape[-3], key_cache.device
    num_queries = count_packed_rows(slots, starts, cu_seqlens, total_tokens)
    check.index_or_none("slots", slots, num_queries, device)
    check.index_or_none("starts", starts, num_queries, device)
    check.cu_seqlens("cu_seqlens", cu_seqlens, num_queries, total_tokens, device)
    return num_queries


@torch.library.register_fake("baton_kernels::insert_kv")
def _fake(*args, **kwargs) -> None:
    check_arguments(*args, **kwargs)
