"""append_kv: write one token per row into a KV cache, rotating it first."""

from __future__ import annotations

from typing import overload

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call, dtype_name

_native = ops.append_kv.default
_native_query = ops.append_kv.query
_native_scaled = ops.append_kv.scaled
_native_scaled_query = ops.append_kv.scaled_query


@overload
def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    *,
    query: None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None: ...


@overload
def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    *,
    query: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def append_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    *,
    query: torch.Tensor | None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | None: ...


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
    """Writes one token per row into its column of its slot, with rotary embedding fused in.

    With `x1 = x[:head_dim/2]`, `x2 = x[head_dim/2:]` (the Llama half-split layout)::

        rotated(x) = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
        key_cache[slots[i], :, columns[i]] = rotated(key[i]);  value_cache[...] = value[i]

    A row is a token, not a query: the tokens of a whole prefill are rows with one slot and
    consecutive columns. The angle belongs to the token's position, never to its column.

    Eight-bit caches get the rotated key (rounded to key's dtype) and the value, quantized as by
    `insert_kv`: the bits are the same as with these two steps.

    Args:
        key: `[rows, num_kv_heads, head_dim]`, float32, float16 or bfloat16, last dimension
            contiguous.
        value: As key.
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, last dimension contiguous.
            Written.
        value_cache: As key_cache. Written.
        slots: `[rows]`, int32: the slot of each row; row i in slot i if None.
        columns: `[rows]`, int32: the column of each row. Required.
        query: `[rows, num_heads, head_dim]`, rotated like key and returned; optional.
        cos: Cosines of each row's position, `[rows, head_dim / 2]`, or `[rows, head_dim]` with one
            angle per element; float32 or key's dtype. Without cos and sin nothing is rotated.
        sin: Sines, as cos.
        key_scale: For eight-bit caches (int8, float8_e4m3fn; CPU only): the scale of each token and
            head, float32 `[num_slots, num_kv_heads, capacity]`. Required with such caches, None
            with others. Written.
        value_scale: As key_scale. Written.

    Returns:
        The rotated query `[rows, num_heads, head_dim]`, contiguous; None without query.

    Raises:
        ValueError: A shape, stride, device or index value does not fit, two rows have the same
            slot and column, only one of cos and sin is given, or a cache shares memory with another
            argument. Nothing is written then.
        TypeError: A dtype is not supported, or differs between tensors of the cache's dtype.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256, or eight-bit caches are
            not on the CPU.

    On a GPU index values are not checked: rows out of range are skipped, and the result of two rows
    in one place is undefined.

    Source: Llama's rotary embedding as in Hugging Face transformers; BATON's decode step.
    """
    # Options with default values are faster if torch fills them in.
    rotary = () if cos is None and sin is None else (cos, sin)
    if key_scale is not None or value_scale is not None:
        rows = key, value, key_cache, value_cache, slots, columns
        scales = key_scale, value_scale
        if key_scale is None or value_scale is None:
            check_arguments(*rows, query, cos, sin, *scales)
        if query is None:
            return call("append_kv", _native_scaled, _check_without_query, *rows, cos, sin, *scales)
        return call(
            "append_kv", _native_scaled_query, check_arguments, *rows, query, cos, sin, *scales
        )
    if query is None:
        return call(
            "append_kv", _native, _check_without_query,
            key, value, key_cache, value_cache, slots, columns, *rotary,
        )  # fmt: skip
    return call(
        "append_kv", _native_query, check_arguments,
        key, value, key_cache, value_cache, slots, columns, query, *rotary,
    )  # fmt: skip


def check_arguments(
    key, value, key_cache, value_cache, slots, columns, query=None, cos=None, sin=None,
    key_scale=None, value_scale=None,
) -> None:  # fmt: skip
    check = Checker("append_kv")
    check.caches(
        key_cache, value_cache, with_layers=False, written=True, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    check.floating("key", key)
    check.tokens("key", key, key_cache)
    check.tokens("value", value, key_cache)
    check.shape("value", value, key.shape)
    rows, _, head_dim = key.shape
    if key_scale is not None:
        check.dtype_as("value", value, "key", key)
    if query is not None:
        of = ("key_cache", key_cache) if key_scale is None else ("key", key)
        check.dtype_as("query", query, *of)
        check.dims("query", query, 3)
        check.shape("query", query, [rows, query.shape[1], head_dim])
        check.last_contiguous("query", query)
    if (cos is None) != (sin is None):
        check.fail("cos and sin", "given together", "only cos" if sin is None else "only sin")
    if cos is not None:
        for name, tensor in (("cos", cos), ("sin", sin)):
            _check_rotary(check, name, tensor, key)
        check.dtype_as("sin", sin, "cos", cos)
        check.shape("sin", sin, cos.shape)
    check.index_or_none("slots", slots, rows, key_cache.device)
    check.index("columns", columns, rows, key_cache.device)


def _check_without_query(
    key, value, key_cache, value_cache, slots, columns, cos=None, sin=None, key_scale=None,
    value_scale=None,
) -> None:  # fmt: skip
    check_arguments(
        key, value, key_cache, value_cache, slots, columns, None, cos, sin, key_scale, value_scale
    )


def _check_rotary(check: Checker, name: str, tensor: torch.Tensor, key: torch.Tensor) -> None:
    check.device(name, tensor, key.device)
    if tensor.dtype not in (torch.float32, key.dtype):
        expected = f"float32 or {dtype_name(key.dtype)} as key"
        check.fail(name, expected, dtype_name(tensor.dtype), TypeError)
    rows, _, head_dim = key.shape
    if tensor.dim() != 2 or tensor.shape[0] != rows or tensor.shape[1] not in (
        head_dim // 2, head_dim,
    ):  # fmt: skip
        expected = f"of shape [{rows}, {head_dim // 2}] or [{rows}, {head_dim}]"
        check.fail(name, expected, list(tensor.shape))
    check.last_contiguous(name, tensor)


@torch.library.register_fake("baton_kernels::append_kv")
@torch.library.register_fake("baton_kernels::append_kv.scaled")
def _fake(*args, **kwargs) -> None:
    _check_without_query(*args, **kwargs)


_fake_scaled = _fake


@torch.library.register_fake("baton_kernels::append_kv.query")
@torch.library.register_fake("baton_kernels::append_kv.scaled_query")
def _fake_query(
    key, value, key_cache, value_cache, slots, columns, query, cos=None, sin=None, key_scale=None,
    value_scale=None,
) -> torch.Tensor:  # fmt: skip
    check_arguments(
        key, value, key_cache, value_cache, slots, columns, query, cos, sin, key_scale, value_scale
    )
    return query.new_empty(query.shape)


_fake_scaled_query = _fake_query
