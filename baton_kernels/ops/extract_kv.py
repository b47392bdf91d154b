"""extract_kv: copy rows out of a KV cache, packed and unpadded."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import (
    EIGHT_BITS,
    FLOATS,
    SCALE_BYTES,
    Checker,
    call,
    count_packed_rows,
    dtype_name,
)

_native = ops.extract_kv.default
_native_out = ops.extract_kv.out
_native_scaled = ops.extract_kv.scaled
_native_scaled_out = ops.extract_kv.scaled_out


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
    """Copies queries out of their slots, packed and without padding: the inverse of insert_kv.

    For query i and its token t::

        key[cu_seqlens[i] + t] = key_cache[slots[i], :, starts[i] + t]

    Args:
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, float32, float16 or bfloat16,
            last dimension contiguous, or with a leading num_layers.
        value_cache: As key_cache.
        cu_seqlens: `[num_queries + 1]`, int32: where each query's tokens begin, from 0 to
            total_tokens; if None, each query has one token.
        slots: `[num_queries]`, int32: the slot of each query; query i in slot i if None. Queries
            may share a slot.
        starts: `[num_queries]`, int32: the column of each query's first token; 0 if None.
        total_tokens: `cu_seqlens[-1]`, known to the host, so that the device need not be read.
        out: key and value to write into instead of new ones, of their shape and the caches' dtype,
            last dimension contiguous, apart from the caches and from each other. On a CPU
            allocating memory takes several times as long as the copy, so a server should keep a
            buffer. Written.
        key_scale: For eight-bit caches (int8, float8_e4m3fn; CPU only): the scale of each token and
            head, float32 `[num_slots, num_kv_heads, capacity]`, or with a leading num_layers.
            Required with such caches, None with others.
        value_scale: As key_scale.
        dtype: For eight-bit caches: float32, float16 or bfloat16 for `element * scale`, computed in
            float32; None for the stored tokens with their scales. With out, its dtype decides.

    Returns:
        key and value, `[total_tokens, num_kv_heads, head_dim]`, contiguous; with a leading
        num_layers if the caches have one. With out: out's tensors. Stored eight-bit tokens are
        `[..., head_dim + 4]`: the elements of a head, then the four bytes of its scale;
        `insert_kv` takes them back, bit by bit.

    Raises:
        ValueError: A shape, stride, device or index value does not fit. Nothing is written then.
        TypeError: A dtype is not supported, out is not a pair of tensors of the caches' dtype, or
            dtype is given with float caches.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256, or eight-bit caches are
            not on the CPU.

    On a GPU index values are not checked; the tokens of a query out of range are undefined.

    Source: BATON (arXiv 2410.18701), preemption: a parked query keeps its keys and values.
    """
    if out is not None and (not isinstance(out, tuple) or len(out) != 2):
        Checker("extract_kv").fail("out", "a pair of tensors", type(out).__name__, TypeError)
    if key_scale is not None or value_scale is not None or dtype is not None:
        rows = cu_seqlens, slots, starts, total_tokens
        return _extract_scaled(key_cache, value_cache, key_scale, value_scale, *rows, out, dtype)
    if out is None:
        return call(
            "extract_kv", _native, check_arguments,
            key_cache, value_cache, cu_seqlens, slots, starts, total_tokens,
        )  # fmt: skip
    call(
        "extract_kv", _native_out, check_out_arguments,
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, *out,
    )  # fmt: skip
    return out


def _extract_scaled(
    key_cache, value_cache, key_scale, value_scale, cu_seqlens, slots, starts, total_tokens, out,
    dtype,
):  # fmt: skip
    given = (
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale
    )  # fmt: skip
    if key_scale is None or value_scale is None:
        _check_scaled(*given, dtype)
    if out is None:
        return call("extract_kv", _native_scaled, _check_scaled, *given, dtype)
    if dtype is not None and out[0].dtype != dtype:
        expected = f"{dtype_name(dtype)} as dtype"
        Checker("extract_kv").fail("out[0]", expected, dtype_name(out[0].dtype), TypeError)
    call("extract_kv", _native_scaled_out, check_scaled_out, *given, *out)
    return out


def _check_scaled(
    key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale,
    dtype=None,
) -> None:  # fmt: skip
    check = Checker("extract_kv")
    if dtype is not None:
        if key_scale is None and value_scale is None:
            check.fail("dtype", "None with a cache of floats", dtype, TypeError)
        if dtype not in FLOATS:
            check.fail("dtype", "float32, float16 or bfloat16", dtype_name(dtype), TypeError)
    check_arguments(
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale
    )


def check_arguments(
    key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale=None,
    value_scale=None,
) -> int:  # fmt: skip
    """The number of queries, when the arguments fit."""
    check = Checker("extract_kv")
    check.caches(
        key_cache, value_cache, with_layers=True, written=False, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    if total_tokens < 0:
        check.fail("total_tokens", "at least 0", total_tokens)
    num_queries = count_packed_rows(slots, starts, cu_seqlens, total_tokens)
    check.index_or_none("slots", slots, num_queries, key_cache.device)
    check.index_or_none("starts", starts, num_queries, key_cache.device)
    check.cu_seqlens("cu_seqlens", cu_seqlens, num_queries, total_tokens, key_cache.device)
    return num_queries


def check_out_arguments(
    key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key, value
) -> int:
    """The number of queries, when the arguments fit."""
    num_queries = check_arguments(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens)
    check = Checker("extract_kv")
    *layers, _, num_kv_heads, _, head_dim = key_cache.shape
    for name, tensor in (("out[0]", key), ("out[1]", value)):
        check.dtype_as(name, tensor, "key_cache", key_cache)
        check.shape(name, tensor, [*layers, total_tokens, num_kv_heads, head_dim])
        check.last_contiguous(name, tensor)
        check.not_expanded(name, tensor)
    return num_queries


def check_scaled_out(
    key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale, key,
    value,
) -> int:  # fmt: skip
    """The number of queries, when the arguments fit."""
    num_queries = check_arguments(
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale
    )
    check = Checker("extract_kv")
    *layers, _, num_kv_heads, _, head_dim = key_cache.shape
    check.device("out[0]", key, key_cache.device)
    if key.dtype in EIGHT_BITS:
        check.dtype_as("out[0]", key, "key_cache", key_cache)
        head_dim += SCALE_BYTES
    else:
        check.floating("out[0]", key)
    check.dtype_as("out[1]", value, "out[0]", key)
    for name, tensor in (("out[0]", key), ("out[1]", value)):
        check.shape(name, tensor, [*layers, total_tokens, num_kv_heads, head_dim])
        check.last_contiguous(name, tensor)
        check.not_expanded(name, tensor)
    return num_queries


@torch.library.register_fake("baton_kernels::extract_kv.scaled_out")
def _fake_scaled_out(*args) -> None:
    check_scaled_out(*args)


@torch.library.register_fake("baton_kernels::extract_kv.out")
def _fake_out(*args) -> None:
    check_out_arguments(*args)


@torch.library.register_fake("baton_kernels::extract_kv")
def _fake(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens):
    check_arguments(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens)
    *layers, _, num_kv_heads, _, head_dim = key_cache.shape
    shape = [*layers, total_tokens, num_kv_heads, head_dim]
    return key_cache.new_empty(shape), key_cache.new_empty(shape)


@torch.library.register_fake("baton_kernels::extract_kv.scaled")
def _fake_scaled(
    key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale,
    dtype=None,
):  # fmt: skip
    _check_scaled(
        key_cache, value_cache, cu_seqlens, slots, starts, total_tokens, key_scale, value_scale,
        dtype,
    )  # fmt: skip
    *layers, _, num_kv_heads, _, head_dim = key_cache.shape
    shape = [*layers, total_tokens, num_kv_heads, head_dim + (SCALE_BYTES if dtype is None else 0)]
    dtype = key_cache.dtype if dtype is None else dtype
    return key_cache.new_empty(shape, dtype=dtype), key_cache.new_empty(shape, dtype=dtype)
