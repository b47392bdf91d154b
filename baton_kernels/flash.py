"""flash-attn's three functions on `ragged_attention`, so that code written for them runs on these.

Signatures, layouts and meanings are flash-attn's (version 2), on CPU as on CUDA: `[batch, tokens,
heads, head_dim]`, `causal=False` by default, masks aligned at the last token. Options that the ops
do not support raise an error that names them; they are never ignored. There is no backward pass.
"""

from __future__ import annotations

from typing import Any

import torch

from baton_kernels.ops.append_kv import append_kv
from baton_kernels.ops.checks import Checker
from baton_kernels.ops.ragged_attention import ragged_attention

__all__ = ["flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention of sequences of one length.

    Args:
        q: `[batch, queries, num_heads, head_dim]`, float32, float16 or bfloat16.
        k: `[batch, keys, num_kv_heads, head_dim]`.
        v: As k.
        dropout_p: 0.
        softmax_scale: Factor of the scores; `head_dim ** -0.5` if None.
        causal: Whether later tokens are hidden from a token; the last query sees the last key.
        window_size: (left, right): keys that a token sees before and after its own; -1 for all.
            right must be 0 or -1.
        softcap: Bound of the scores; 0 for none.
        alibi_slopes: `[num_heads]`, float32.
        deterministic: Ignored: the result always is.
        return_attn_probs: Also return the logarithm of the softmax denominator.

    Returns:
        `[batch, queries, num_heads, head_dim]`; with return_attn_probs (out, lse `[batch,
        num_heads, queries]`, None).

    Raises:
        NotImplementedError: An option is not supported.
        ValueError, TypeError: As `ragged_attention`.

    Source: flash_attn_func of flash-attn 2.
    """
    _refuse("flash_attn_func", dropout_p)
    batch, queries, num_heads, head_dim = _shape("flash_attn_func", "q", q)
    _shape("flash_attn_func", "k", k)
    keys, device = k.shape[1], q.device
    result = ragged_attention(
        q.reshape(batch * queries, num_heads, head_dim),
        k.transpose(1, 2),
        v.transpose(1, 2),
        _boundaries(batch, queries, device),
        torch.arange(batch, dtype=torch.int32, device=device),
        torch.zeros(batch, dtype=torch.int32, device=device),
        torch.full((batch,), keys, dtype=torch.int32, device=device),
        scale=softmax_scale,
        **_mask("flash_attn_func", causal, window_size),
        softcap=softcap,
        alibi_slopes=_slopes("flash_attn_func", alibi_slopes),
        max_query_length=queries,
        max_length=keys,
        return_lse=return_attn_probs,
    )
    if isinstance(result, torch.Tensor):
        return result.view(q.shape)
    out, lse = result
    return out.view(q.shape), _lse_by_head(lse, batch, queries), None


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention of packed sequences.

    Args:
        q: `[total_q, num_heads, head_dim]`, float32, float16 or bfloat16.
        k: `[total_k, num_kv_heads, head_dim]`; with block_table `[pages, page, num_kv_heads,
            head_dim]`.
        v: As k.
        cu_seqlens_q: `[sequences + 1]`, int32: where each sequence's queries begin.
        cu_seqlens_k: `[sequences + 1]`, int32: where its keys begin.
        max_seqlen_q: A bound of the query lengths.
        max_seqlen_k: A bound of the key lengths.
        dropout_p: 0.
        softmax_scale: As in `flash_attn_func`.
        causal: As in `flash_attn_func`.
        window_size: As in `flash_attn_func`.
        softcap: As in `flash_attn_func`.
        alibi_slopes: As in `flash_attn_func`.
        deterministic: Ignored: the result always is.
        return_attn_probs: Also return the logarithm of the softmax denominator.
        block_table: `[sequences, max_pages]`, int32: the pages of each sequence's keys, in order;
            cu_seqlens_k then counts them.

    Returns:
        `[total_q, num_heads, head_dim]`; with return_attn_probs (out, lse `[num_heads, total_q]`,
        None).

    Raises:
        NotImplementedError: An option is not supported.
        ValueError, TypeError: As `ragged_attention`.

    Source: flash_attn_varlen_func of flash-attn 2.
    """
    op = "flash_attn_varlen_func"
    _refuse(op, dropout_p)
    cu_seqlens_k = cu_seqlens_k.int()
    starts = cu_seqlens_k[:-1].contiguous()
    # All keys lie in one slot, one sequence after the other; in pages each begins at column 0.
    slots = torch.zeros_like(starts)
    if block_table is None:
        keys, values = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    else:
        _shape(op, "k", k)
        keys, values, starts = k.transpose(1, 2), v.transpose(1, 2), slots
    result = ragged_attention(
        q,
        keys,
        values,
        cu_seqlens_q.int(),
        slots,
        starts,
        cu_seqlens_k.diff(),
        scale=softmax_scale,
        **_mask(op, causal, window_size),
        softcap=softcap,
        alibi_slopes=_slopes(op, alibi_slopes),
        max_query_length=int(max_seqlen_q),
        max_length=int(max_seqlen_k),
        block_table=block_table,
        return_lse=return_attn_probs,
    )
    if isinstance(result, torch.Tensor):
        return result
    out, lse = result
    return out, lse.t().contiguous(), None


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Writes new keys and values into a cache, then attends to it.

    Row i's valid columns are `[cache_leftpad[i], cache_seqlens[i] + new)` of the cache's row
    `cache_batch_idx[i]`; the new tokens take the columns from `cache_seqlens[i]` on. With
    block_table column c of row i is column `c % page` of page `block_table[i, c // page]`.

    Args:
        q: `[batch, queries, num_heads, head_dim]`, float32, float16 or bfloat16.
        k_cache: `[cache_batch, columns, num_kv_heads, head_dim]`, last dimension contiguous; with
            block_table `[pages, page, num_kv_heads, head_dim]`. Written.
        v_cache: As k_cache. Written.
        k: `[batch, new, num_kv_heads, head_dim]`; None to write nothing.
        v: As k.
        rotary_cos: `[positions, head_dim / 2]`: rotates k and q at the position of their column;
            None to rotate nothing. Requires k, no cache_leftpad, rotary_interleaved=False, and
            causal or one query; otherwise flash-attn rotates all queries to one position.
        rotary_sin: As rotary_cos.
        cache_seqlens: int or `[batch]` int32: columns in use before, including padding; None for
            all (without k).
        cache_batch_idx: `[batch]`, int32: the cache row of each row; None for i; must be None with
            block_table.
        cache_leftpad: `[batch]`, int32: the first valid column; None for 0.
        block_table: `[batch, max_pages]`, int32: the pages of each row.
        softmax_scale: As in `flash_attn_func`.
        causal: As in `flash_attn_func`.
        window_size: As in `flash_attn_func`.
        softcap: As in `flash_attn_func`.
        rotary_interleaved: False if rotary_cos is given.
        alibi_slopes: As in `flash_attn_func`.
        num_splits: Ignored: the splits depend only on a row's length, so that its bits do too.
        return_softmax_lse: Also return the logarithm of the softmax denominator.

    Returns:
        `[batch, queries, num_heads, head_dim]`; with return_softmax_lse also lse `[batch,
        num_heads, queries]`.

    Raises:
        NotImplementedError: An option is not supported.
        ValueError, TypeError: As `append_kv` and `ragged_attention`. Nothing is written if
            `append_kv` refuses.

    Source: flash_attn_with_kvcache of flash-attn 2.
    """
    op = "flash_attn_with_kvcache"
    batch, queries, num_heads, head_dim = _shape(op, "q", q)
    _shape(op, "k_cache", k_cache)
    page, device = k_cache.shape[1], q.device
    columns = page if block_table is None else page * block_table.shape[-1]
    if (k is None) != (v is None):
        raise ValueError(f"{op}: k and v must be given together, got only one")
    if k is not None and cache_seqlens is None:
        raise ValueError(f"{op}: cache_seqlens must be given with k, got None")
    used = columns if cache_seqlens is None else cache_seqlens
    if isinstance(used, int):
        used = torch.full((batch,), used, dtype=torch.int32, device=device)
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(f"{op}: cache_batch_idx must be None with block_table, got a tensor")
        _check_table(op, block_table, batch, k_cache)
    slots = (
        torch.arange(batch, dtype=torch.int32, device=device)
        if cache_batch_idx is None
        else cache_batch_idx.int()
    )
    keys, values = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    ends, query = used.int(), q.reshape(batch * queries, num_heads, head_dim)
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError(f"{op}: rotary_cos and rotary_sin must be given together, got only one")
    if rotary_cos is not None:
        _check_rotary(op, k, queries, causal, window_size, cache_leftpad, rotary_interleaved)
    if k is not None and v is not None:
        new = _shape(op, "k", k)[1]
        written = (ends[:, None] + torch.arange(new, device=device)).flatten().int()
        rotary = {}
        if rotary_cos is not None and rotary_sin is not None:
            rotary = {"cos": rotary_cos[written.long()], "sin": rotary_sin[written.long()]}
            query = _rotate(query, ends, queries, rotary_cos, rotary_sin)
        places = slots.repeat_interleave(new), written
        if block_table is not None:
            places = _places_in_pages(block_table, written.view(batch, new), page)
        append_kv(
            k.reshape(batch * new, *k.shape[2:]),
            v.reshape(batch * new, *v.shape[2:]),
            keys,
            values,
            *places,
            **rotary,
        )
        ends = ends + new
    starts = torch.zeros_like(ends) if cache_leftpad is None else cache_leftpad.int()
    result = ragged_attention(
        query,
        keys,
        values,
        _boundaries(batch, queries, device),
        slots,
        starts,
        ends - starts,
        scale=softmax_scale,
        **_mask(op, causal, window_size),
        softcap=softcap,
        alibi_slopes=_slopes(op, alibi_slopes),
        max_query_length=queries,
        max_length=columns,
        block_table=block_table,
        return_lse=return_softmax_lse,
    )
    if isinstance(result, torch.Tensor):
        return result.view(q.shape)
    out, lse = result
    return out.view(q.shape), _lse_by_head(lse, batch, queries)


def _shape(op: str, name: str, tensor: torch.Tensor) -> torch.Size:
    if tensor.dim() != 4:
        raise ValueError(
            f"{op}: {name} must be [batch, tokens, heads, head_dim], got {list(tensor.shape)}"
        )
    return tensor.shape


def _boundaries(batch: int, queries: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * queries


def _check_table(op: str, table: torch.Tensor, rows: int, pages: torch.Tensor) -> None:
    """Rejects a table that `ragged_attention` would reject, before anything is written."""
    check = Checker(op)
    check.index_rows("block_table", table, rows, pages.device)
    if table.shape[1] < 1 or pages.shape[1] < 1:
        expected = "of at least one page of at least one column"
        check.fail("block_table", expected, f"{table.shape[1]} pages of {pages.shape[1]}")


def _places_in_pages(
    block_table: torch.Tensor, columns: torch.Tensor, page: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page and column of every column of every row; no page has the number -1."""
    index, last = columns // page, block_table.shape[1] - 1
    pages = block_table.gather(1, index.clamp(0, last).long())
    is_there = (columns >= 0) & (index <= last)
    return torch.where(is_there, pages, -1).flatten(), (columns % page).flatten()


def _lse_by_head(lse: torch.Tensor, batch: int, queries: int) -> torch.Tensor:
    return lse.view(batch, queries, -1).transpose(1, 2).contiguous()


def _mask(op: str, causal: bool, window_size: tuple[int, int]) -> dict[str, Any]:
    """`causal` and `window` of ragged_attention; its window counts the token itself."""
    left, right = window_size
    if right > 0 and not causal:
        raise NotImplementedError(
            f"{op}: window_size must end at the token or not at all, (left, 0) or (left, -1), "
            f"got {tuple(window_size)}"
        )
    return {"causal": causal or right == 0, "window": None if left < 0 else left + 1}


def _slopes(op: str, alibi_slopes: torch.Tensor | None) -> torch.Tensor | None:
    if alibi_slopes is not None and alibi_slopes.dim() != 1:
        raise NotImplementedError(
            f"{op}: alibi_slopes must be [num_heads], got {list(alibi_slopes.shape)}"
        )
    return alibi_slopes


def _refuse(op: str, dropout_p: float) -> None:
    """Raise for options that no op supports."""
    if dropout_p:
        raise NotImplementedError(f"{op}: dropout_p must be 0, got {dropout_p}")


def _check_rotary(op, k, queries, causal, window_size, cache_leftpad, interleaved) -> None:
    if interleaved:
        raise NotImplementedError(f"{op}: rotary_interleaved must be False, got True")
    if cache_leftpad is not None:
        raise NotImplementedError(
            f"{op}: cache_leftpad must be None with rotary_cos, which would rotate by column, "
            "not by position, got a tensor; rotate q and k before the call"
        )
    if k is None:
        raise ValueError(f"{op}: k must be given with rotary_cos, got None")
    if queries > 1 and not causal and tuple(window_size) == (-1, -1):
        raise NotImplementedError(
            f"{op}: causal must be True with rotary_cos and several queries, got False"
        )


def _rotate(
    query: torch.Tensor,
    ends: torch.Tensor,
    queries: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """The queries of every row at the positions from its end on, in the half-split layout."""
    positions = (ends[:, None] + torch.arange(queries, device=ends.device)).flatten().long()
    cos, sin = cos[positions, None].float(), sin[positions, None].float()
    first, second = query.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(query.dtype)
