"""The table of docs/flash_attn.md: each row, called through flash-attn's function and the op."""

import re
from pathlib import Path

import pytest
import torch

from baton_kernels import append_kv, ragged_attention
from baton_kernels.flash import flash_attn_with_kvcache
from baton_kernels.testing import assert_same_bits, int32, twin

TABLE = Path(__file__).resolve().parents[2] / "docs" / "flash_attn.md"
BATCH, HEADS, KV_HEADS, DIM, COLUMNS = 3, 4, 2, 32, 12
SEQLENS, LEFTPAD = int32([5, 9, 12]), int32([1, 0, 4])
ALIBI = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def tensors(queries=1):
    generator = torch.Generator().manual_seed(queries)
    q = torch.randn(BATCH, queries, HEADS, DIM, generator=generator)
    caches = torch.randn(2, BATCH + 1, COLUMNS, KV_HEADS, DIM, generator=generator)
    return q, *caches


def rows_of_caches(*caches):
    return [cache.transpose(1, 2) for cache in caches]


def both(flash, ours, queries=1, lse=False):
    """The results of the two calls, packed; the arguments are flash-attn's options and ours."""
    q, k_cache, v_cache = tensors(queries)
    if "cache_batch_idx" not in flash:
        k_cache, v_cache = k_cache[:BATCH], v_cache[:BATCH]
    want = flash_attn_with_kvcache(q, k_cache, v_cache, **flash)
    got = ragged_attention(q.flatten(0, 1), *rows_of_caches(k_cache, v_cache), **ours)
    if lse:
        return [want[0].flatten(0, 1), want[1].transpose(1, 2).flatten(0, 1)], list(got)
    return [want.flatten(0, 1)], [got]


def written():
    """One new token per row, then attention to it; the caches are compared too."""
    q, k_cache, v_cache = tensors()
    k_cache, v_cache = k_cache[:BATCH], v_cache[:BATCH]
    new = torch.randn(2, BATCH, 1, KV_HEADS, DIM, generator=torch.Generator().manual_seed(9))
    used = SEQLENS.clamp(max=COLUMNS - 1)
    theirs, ours = [twin(k_cache), twin(v_cache)], [twin(k_cache), twin(v_cache)]
    want = flash_attn_with_kvcache(q, *theirs, *new, cache_seqlens=used)
    append_kv(*new[:, :, 0], *rows_of_caches(*ours), columns=used)
    got = ragged_attention(q[:, 0], *rows_of_caches(*ours), lengths=used + 1)
    return [want[:, 0], *theirs], [got, *ours]


def rotated():
    """The same, with query and key rotated to their positions."""
    q, k_cache, v_cache = tensors()
    k_cache, v_cache = k_cache[:BATCH], v_cache[:BATCH]
    new = torch.randn(2, BATCH, 1, KV_HEADS, DIM, generator=torch.Generator().manual_seed(9))
    used = SEQLENS.clamp(max=COLUMNS - 1)
    angles = torch.arange(COLUMNS)[:, None] * torch.linspace(1, 0.01, DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    theirs, ours = [twin(k_cache), twin(v_cache)], [twin(k_cache), twin(v_cache)]
    want = flash_attn_with_kvcache(
        q, *theirs, *new, cos, sin, cache_seqlens=used, rotary_interleaved=False
    )
    query = append_kv(
        *new[:, :, 0],
        *rows_of_caches(*ours),
        columns=used,
        query=q[:, 0],
        cos=cos[used.long()],
        sin=sin[used.long()],
    )
    got = ragged_attention(query, *rows_of_caches(*ours), lengths=used + 1)
    return [want[:, 0], *theirs], [got, *ours]


def paged():
    """The caches' rows as pages of 12 columns, two to a row; the new token goes to a page."""
    q, *caches = tensors()
    table, used = int32([2, 0, 1, 3, 3, 1]).view(3, 2), int32([5, 17, 12])
    new = torch.randn(2, BATCH, 1, KV_HEADS, DIM, generator=torch.Generator().manual_seed(9))
    theirs, ours = [twin(x) for x in caches], [twin(x) for x in caches]
    want = flash_attn_with_kvcache(q, *theirs, *new, cache_seqlens=used, block_table=table)
    pages = table[torch.arange(BATCH), used // COLUMNS]
    append_kv(*new[:, :, 0], *rows_of_caches(*ours), slots=pages, columns=used % COLUMNS)
    got = ragged_attention(q[:, 0], *rows_of_caches(*ours), lengths=used + 1, block_table=table)
    return [want[:, 0], *theirs], [got, *ours]


FULL = {"cache_seqlens": COLUMNS}
LENGTHS = {"lengths": int32([COLUMNS] * BATCH)}
PREFILL = {"cu_seqlens_q": int32([0, 2, 4, 6])}
ROWS = {
    "`q`": lambda: both(FULL, LENGTHS),
    "`k_cache`, `v_cache`": lambda: both({"cache_seqlens": SEQLENS}, {"lengths": SEQLENS}),
    "`cu_seqlens_q`": lambda: both(FULL | {"causal": True}, LENGTHS | PREFILL, queries=2),
    "`cache_batch_idx`": lambda: both(
        FULL | {"cache_batch_idx": int32([3, 0, 2])}, LENGTHS | {"slots": int32([3, 0, 2])}
    ),
    "`cache_leftpad`": lambda: both(
        {"cache_seqlens": SEQLENS, "cache_leftpad": LEFTPAD},
        {"starts": LEFTPAD, "lengths": SEQLENS - LEFTPAD},
    ),
    "`cache_seqlens`": lambda: both(
        {"cache_seqlens": SEQLENS, "cache_leftpad": LEFTPAD},
        {"starts": LEFTPAD, "lengths": SEQLENS - LEFTPAD},
    ),
    "`window_size=(w - 1, 0)`": lambda: both(
        FULL | {"window_size": (2, 0)}, LENGTHS | {"window": 3}
    ),
    "`block_table`": paged,
    "`causal=True`": lambda: both(FULL | {"causal": True}, LENGTHS | PREFILL, queries=2),
    "`causal=False`": lambda: both(FULL, LENGTHS | PREFILL | {"causal": False}, queries=2),
    "`softmax_scale`": lambda: both(FULL | {"softmax_scale": 0.3}, LENGTHS | {"scale": 0.3}),
    "`softcap`, `alibi_slopes`": lambda: both(
        FULL | {"softcap": 2.0, "alibi_slopes": ALIBI},
        LENGTHS | {"softcap": 2.0, "alibi_slopes": ALIBI},
    ),
    "`return_softmax_lse`": lambda: both(
        FULL | {"return_softmax_lse": True}, LENGTHS | {"return_lse": True}, lse=True
    ),
    "`k`, `v`": written,
    "`rotary_cos`, `rotary_sin`": rotated,
}


def test_every_row_of_the_table_is_here():
    rows = re.findall(r"^\| (.+?) \|", TABLE.read_text(), re.MULTILINE)
    assert rows[:2] == ["flash-attn", "---"] and rows[2:] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_row(row):
    want, got = ROWS[row]()
    for theirs, ours in zip(want, got, strict=True):
        if "rotary" in row:
            # flash-attn's function rotates the query by itself, in another order of operations.
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert_same_bits(ours.contiguous(), theirs.contiguous())


def test_what_is_overlooked_changes_the_result():
    """The rows that the page warns about."""
    want, got = both(
        {"cache_seqlens": SEQLENS, "cache_leftpad": LEFTPAD},
        {"starts": LEFTPAD, "lengths": torch.minimum(SEQLENS, COLUMNS - LEFTPAD)},
    )
    assert not torch.allclose(got[0], want[0])
    want, got = both(FULL | {"window_size": (2, 0)}, LENGTHS | {"window": 2})
    assert not torch.allclose(got[0], want[0])
