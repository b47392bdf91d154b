"""ragged_attention: masked attention over a batch whose rows start and end anywhere."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, cast, overload

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call, count_rows

_native = ops.ragged_attention.default
_native_options = ops.ragged_attention.options
_native_lse = ops.ragged_attention.lse
_native_out = ops.ragged_attention.out
_native_lse_out = ops.ragged_attention.lse_out


@overload
def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[False] = False,
    out: torch.Tensor | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor: ...


@overload
def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: Literal[True],
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of every query token over the valid columns of its row, padding never read.

    Row i's query tokens are the last of its `lengths[i]` tokens, already in the cache: token j of
    `q_len` has position `p = lengths[i] - q_len + j`, key k in `[0, lengths[i])` lies in column
    `starts[i] + k`::

        s_k = scale * q . key_k;   s_k = softcap * tanh(s_k / softcap) if softcap > 0
        s_k = s_k - slope * |p - k|;   hidden unless k <= p (causal) and k > p - window
        out = sum_k softmax(s)_k value_k;   lse = log(sum_k exp(s_k) + exp(sink))

    One call serves decode (q_len 1), chunked prefill, whole prefill and any mixture. A row of 4
    tokens that decodes one, and a prefill chunk of 2 at the end of 3 tokens (x sees, . does not)::

        slot 5  columns 2 3 4 5     token 0   x x x x        starts = [2, 0], lengths = [4, 3]
        slot 1  columns 0 1 2       token 1   x x .          cu_seqlens_q = [0, 1, 3]
                                    token 2   x x x

    A hidden key never affects a token, even if its key or value is NaN or infinite.

    Batch invariance: a row's bits depend on that row only, not on the rest of the batch, its slot,
    its start, the capacity or the number of threads. On the CPU a token's bits depend only on its
    query vector, its position and the keys and values that it sees: it gets the same bits whether
    it is decoded, prefilled whole or in chunks of any size, computed again, or behind a reused
    prefix. The CUDA kernels guarantee that for chunks of at least two tokens; a row of one token
    has the bits of decoding, which depend only on the token's position as well.

    Args:
        query: `[total_queries, num_heads, head_dim]`, float32, float16 or bfloat16, last dimension
            contiguous; num_heads a multiple of num_kv_heads (head h uses KV head
            `h // (num_heads / num_kv_heads)`).
        key_cache: `[num_slots, num_kv_heads, capacity, head_dim]`, last dimension contiguous; with
            block_table `[pages, num_kv_heads, page, head_dim]`.
        value_cache: As key_cache.
        cu_seqlens_q: `[rows + 1]`, int32: where each row's query tokens begin, from 0 to
            total_queries; if None, each row has one token (decode).
        slots: `[rows]`, int32; row i in slot i if None. Rows may share a slot. Ignored with
            block_table.
        starts: `[rows]`, int32: the first valid column; 0 if None.
        lengths: `[rows]`, int32: the number of valid columns, including the query tokens' own.
            Required.
        scale: Factor of the scores; `head_dim ** -0.5` if None.
        causal: Whether later tokens are hidden from a token.
        window: A token sees the last `window` tokens, itself included; all if None.
        softcap: Bound of the scores; 0 for none.
        alibi_slopes: `[num_heads]`, float32: penalty per position of distance.
        sinks: `[num_heads]`, float32: one more logit in the softmax denominator.
        return_lse: Also return the logarithm of the softmax denominator.
        out: A tensor to write into instead of a new one, of query's shape and dtype; with
            return_lse a pair, whose second tensor is float32 `[total_queries, num_heads]`.
            Contiguous, apart from the other tensors. Written.
        max_query_length: An upper bound of the rows' query lengths that the host knows. It saves
            work and never changes a result.
        max_length: The same for lengths.
        block_table: `[rows, max_pages]`, int32, last dimension contiguous: column c of row i is
            column `c % page` of page `block_table[i, c // page]`. Rows may share pages; entries
            without any of a row's valid columns may be anything. The bits are the same as for the
            same columns in slots.
        key_scale: For eight-bit caches (int8, float8_e4m3fn; CPU only): the scale of each token and
            head, float32 `[num_slots, num_kv_heads, capacity]`; a key is its elements times its
            scale. Required with such caches, None with others.
        value_scale: As key_scale.

    Returns:
        out `[total_queries, num_heads, head_dim]`, contiguous; with return_lse also lse
        `[total_queries, num_heads]`, float32, natural logarithm, including the sink. A token that
        sees no key (`p < 0`, when a row has more query tokens than `lengths[i]`) gives zeros and
        lse = -inf, or the sink. A token that sees keys whose scores are all -inf (overflowed) gives
        NaN and lse = -inf, as torch.softmax and logsumexp do; with a sink it gives zeros and the
        sink. A score of +inf or NaN gives NaN for both. With out: out's tensors.

    Raises:
        ValueError: A shape, stride, device, index value or option does not fit.
        TypeError: A dtype is not supported, or differs between query and float caches.
        NotImplementedError: head_dim is not a multiple of 8 from 16 to 256, or eight-bit caches are
            not on the CPU.

    On a GPU index values are not checked: a row out of range is skipped, and its part of the
    results is undefined, as is that of a row with a page out of range; no byte outside the caches
    is read. There is no backward pass.

    Source: BATON (arXiv 2410.18701), the mask of a shaped batch; online softmax and split keys as
    in FlashAttention-2 and Flash-Decoding; sinks as in gpt-oss; block tables as in vLLM's
    PagedAttention.
    """
    # Converting ten options takes most of a microsecond, so defaults are not passed.
    native: Any = _native
    options: tuple[Any, ...] = ()
    if not (
        scale is None and causal is True and window is None and softcap == 0.0
        and alibi_slopes is None and sinks is None
        and max_query_length is None and max_length is None and block_table is None
        and key_scale is None and value_scale is None
    ):  # fmt: skip
        native, options = _native_options, (
            scale, causal, window, softcap, alibi_slopes, sinks, max_query_length, max_length,
            block_table, key_scale, value_scale,
        )  # fmt: skip
    if out is not None:
        return _call_out(
            out, return_lse,
            query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, *options,
        )  # fmt: skip
    return call(
        "ragged_attention", _native_lse if return_lse else native, check_arguments,
        query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, *options,
    )  # fmt: skip


def _call_out(out: Any, return_lse: bool, *args: Any) -> Any:
    if not return_lse:
        results, native = {"out": out}, cast(Any, _native_out)
    elif isinstance(out, tuple) and len(out) == 2:
        results, native = {"out": out[0], "lse": out[1]}, _native_lse_out
    else:
        expected = "a pair of tensors with return_lse"
        Checker("ragged_attention").fail("out", expected, type(out).__name__, TypeError)
    call(
        "ragged_attention",
        functools.partial(native, **results),
        functools.partial(check_out_arguments, **results),
        *args,
    )
    return out


def check_arguments(
    query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths,
    scale=None, causal=True, window=None, softcap=0.0, alibi_slopes=None, sinks=None,
    max_query_length=None, max_length=None, block_table=None, key_scale=None, value_scale=None, *,
    in_triton=False,
) -> None:  # fmt: skip
    """in_triton: the kernels are Triton's, regardless of torch's choice for the device."""
    check = Checker("ragged_attention")
    check.caches(
        key_cache, value_cache, with_layers=False, written=False, key_scale=key_scale,
        value_scale=value_scale,
    )  # fmt: skip
    if key_scale is not None and in_triton:
        expected = "None with the Triton kernels (those of the CPU take eight bits)"
        check.fail("key_scale", expected, "a tensor", NotImplementedError)
    check.floating("query", query)
    if key_scale is None:
        check.dtype_as("query", query, "key_cache", key_cache)
    check.device("query", query, key_cache.device)
    check.dims("query", query, 3)
    total_queries, num_heads, _ = query.shape
    check.shape("query", query, [total_queries, num_heads, key_cache.shape[-1]])
    check.last_contiguous("query", query)
    num_kv_heads = key_cache.shape[1]
    if num_heads < 1 or num_heads % num_kv_heads:
        check.fail("num_heads", f"a multiple of num_kv_heads = {num_kv_heads}", num_heads)
    if scale is not None and not math.isfinite(scale):
        check.fail("scale", "finite", scale)
    if not 0.0 <= softcap < math.inf:
        check.fail("softcap", "0 (none) or positive", softcap)
    if window is not None and window < 1:
        check.fail("window", "at least 1", window)
    for name, bound in (("max_query_length", max_query_length), ("max_length", max_length)):
        if bound is not None and bound < 0:
            check.fail(name, "at least 0", bound)
    for name, tensor in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if tensor is not None:
            check.float32(name, tensor, query.device)
            check.shape(name, tensor, [num_heads])
            check.contiguous(name, tensor)
    check.tensor("lengths", lengths)
    if block_table is not None:
        slots = None
    rows = count_rows(slots, starts, otherwise=lengths.numel())
    check.index_or_none("slots", slots, rows, query.device)
    check.index_or_none("starts", starts, rows, query.device)
    check.index("lengths", lengths, rows, query.device)
    check.cu_seqlens("cu_seqlens_q", cu_seqlens_q, rows, total_queries, query.device)
    if block_table is not None:
        if key_cache.shape[2] < 1:
            expected = "of pages of at least one column with block_table"
            check.fail("key_cache", expected, f"shape {list(key_cache.shape)}")
        check.index_rows("block_table", block_table, rows, query.device)


def check_out_arguments(*args, out, lse=None, in_triton=False) -> None:
    check_arguments(*args, in_triton=in_triton)
    query, check = args[0], Checker("ragged_attention")
    check.dtype_as("out", out, "query", query)
    check.shape("out", out, query.shape)
    check.contiguous("out", out)
    if lse is not None:
        check.float32("lse", lse, query.device)
        check.shape("lse", lse, query.shape[:2])
        check.contiguous("lse", lse)


@torch.library.register_fake("baton_kernels::ragged_attention")
@torch.library.register_fake("baton_kernels::ragged_attention.options")
def _fake(query, *args, **options) -> torch.Tensor:
    check_arguments(query, *args, **options)
    return query.new_empty(query.shape)


_fake_options = _fake


@torch.library.register_fake("baton_kernels::ragged_attention.lse")
def _fake_lse(query, *args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    out = _fake(query, *args, **options)
    return out, query.new_empty(query.shape[:2], dtype=torch.float32)


@torch.library.register_fake("baton_kernels::ragged_attention.out")
@torch.library.register_fake("baton_kernels::ragged_attention.lse_out")
def _fake_out(*args, out, lse=None) -> None:
    check_out_arguments(*args, out=out, lse=lse)


_fake_lse_out = _fake_out
