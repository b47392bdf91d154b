"""insert_kv: write prefilled queries into slots of a KV cache."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call, count_packed_rows

_native = ops.insert_kv.default
_native_scaled = ops.insert_kv.scaled


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
    """Writes the keys and values of prefilled queries into their slots, all layers in one call.

    For query i and its token t::

        key_cache[slots[i], :, starts[i] + t] = key[cu_seqlens[i] + t]

    and value likewise. Two queries of 2 and 3 tokens, into slots 3 and 0 of an aligned shape that
    ends in column 4 (`.` is not written)::

        key    a0 a1 b0 b1 b2      slot 0   .  b0 b1 b2  .       starts = [2, 1]
                                   slot 3   .  .  a0 a1  .       cu_seqlens = [0, 2, 5]

    With eight-bit caches every token and head x is quantized, in float32::

        scale = max |x| / top;  element = round(x / scale), ties to even

    top is 127 for int8 (elements within [-127, 127]), 448 for float8_e4m3fn. Scale and elements are
    0 where max |x| / top is below the smallest normal float32; where an element of x is NaN or
    infinite, the scale is NaN and the elements are 0. An element stands for `element * scale`.

    Args:
        key: Packed keys, `[total_tokens, num_kv_heads, head_dim]`, float32, float16 or bfloat16,
            last dimension contiguous; with a leading num_layers if the caches have one. For
            eight-bit caches also tokens as `extract_kv` returns them without dtype, `[...,
            head_dim + 4]` of the caches' dtype: the elements of a head and the bytes of its scale.
        value: As key.
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, last dimension contiguous, or
            with a leading num_layers. Written.
        value_cache: As key_cache. Written.
        cu_seqlens: `[num_queries + 1]`, int32: where each query's tokens begin, from 0 to
            total_tokens; if None, each query has one token.
        slots: `[num_queries]`, int32: the slot of each query; query i in slot i if None.
        starts: `[num_queries]`, int32: the column of each query's first token; 0 if None.
        zero_padding: Also clear columns `[0, starts[i])`, for consumers that multiply padding.
        key_scale: For eight-bit caches (int8, float8_e4m3fn; CPU only): the scale of each token and
            head, float32 `[num_slots, num_kv_heads, capacity]`, or with a leading num_layers.
            Required with such caches, None with others. Written.
        value_scale: As key_scale. Written.

    Raises:
        ValueError: A shape, stride, device or index value does not fit, two queries' targets
            overlap (including columns that zero_padding clears), or a cache shares memory with
            another argument. Nothing is written then.
        TypeError: A dtype is not supported, or differs between tensors of the cache's dtype.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256, or eight-bit caches are
            not on the CPU.

    On a GPU index values are not checked: queries out of range are skipped, and the result of
    overlapping targets is undefined.

    Source: BATON (arXiv 2410.18701), embedding of prefilled keys and values in the running batch.
    """
    if key_scale is not None or value_scale is not None:
        given = (
            key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding, key_scale,
            value_scale,
        )  # fmt: skip
        if key_scale is None or value_scale is None:
            check_arguments(*given)
        return call("insert_kv", _native_scaled, check_arguments, *given)
    call(
        "insert_kv", _native, check_arguments,
        key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding,
    )  # fmt: skip


def check_arguments(
    key, value, key_cache, value_cache, cu_seqlens, slots, starts, zero_padding=False,
    key_scale=None, value_scale=None,
) -> int:  # fmt: skip
    """The number of queries, when the arguments fit."""
    check = Checker("insert_kv")
    check.caches(
        key_cache, value_cache, with_layers=True, written=True, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    if key_scale is None:
        check.floating("key", key)
    check.tokens("key", key, key_cache)
    check.tokens("value", value, key_cache)
    if key_scale is not None:
        check.dtype_as("value", value, "key", key)
    check.shape("value", value, key.shape)
    total_tokens, device = key.shape[-3], key_cache.device
    num_queries = count_packed_rows(slots, starts, cu_seqlens, total_tokens)
    check.index_or_none("slots", slots, num_queries, device)
    check.index_or_none("starts", starts, num_queries, device)
    check.cu_seqlens("cu_seqlens", cu_seqlens, num_queries, total_tokens, device)
    return num_queries


@torch.library.register_fake("baton_kernels::insert_kv")
@torch.library.register_fake("baton_kernels::insert_kv.scaled")
def _fake(*args, **kwargs) -> None:
    check_arguments(*args, **kwargs)


_fake_scaled = _fake
