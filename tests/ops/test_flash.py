"""flash-attn's functions compared with their documentation, written as float64 torch code."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from baton_kernels import flash
from baton_kernels.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache


def attend(q, k, v, causal=False, window=(-1, -1), softcap=0.0, slopes=None, scale=None):
    """One sequence: q `[queries, heads, dim]`, k and v `[keys, kv_heads, dim]`; out and lse."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # The last query sees the last key.
    at = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
    key = torch.arange(k.shape[1])
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * (at - key).abs()
    left, right = window
    seen = torch.ones_like(at * key, dtype=torch.bool)
    if causal or right >= 0:
        seen &= key <= at + (0 if causal else right)
    if left >= 0:
        seen &= key >= at - left
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    return (scores.softmax(-1).nan_to_num(0.0) @ v).transpose(0, 1), lse


def qkv(batch=2, queries=5, keys=9, heads=4, kv_heads=2, dim=32, dtype=torch.float32):
    generator = torch.Generator().manual_seed(queries * 100 + keys)
    # Slices of larger tensors, so that strides are not trivial.
    return (
        torch.randn(batch, n, h, dim + 8, generator=generator).to(dtype)[..., :dim]
        for n, h in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "causal window": {"causal": True, "window_size": (3, 0)},
    "causal window, right ignored": {"causal": True, "window_size": (3, 2)},
    "window to the token": {"window_size": (2, 0)},
    "window and all later": {"window_size": (2, -1)},
    "all up to the token": {"window_size": (-1, 0)},
    "softcap": {"causal": True, "softcap": 2.0},
    "alibi": {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "scale": {"softmax_scale": 0.3},
}


def reference_options(options):
    names = {"window_size": "window", "alibi_slopes": "slopes", "softmax_scale": "scale"}
    renamed = {names.get(name, name): value for name, value in options.items()}
    if renamed.get("causal") and "window" in renamed:
        renamed["window"] = (renamed["window"][0], 0)
    return renamed


@pytest.mark.parametrize("name", OPTIONS)
def test_one_length(name):
    options = OPTIONS[name]
    q, k, v = qkv()
    out, lse, none = flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert none is None
    for row in range(2):
        want, want_lse = attend(q[row], k[row], v[row], **reference_options(options))
        torch.testing.assert_close(out[row].double(), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), want_lse, rtol=0, atol=1e-5)
    assert torch.equal(flash_attn_func(q, k, v, **options), out)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed(name):
    options = OPTIONS[name]
    q, k, v = (x[0] for x in qkv(1, 12, 20))
    cu_q, cu_k = torch.tensor([0, 1, 8, 12]).int(), torch.tensor([0, 6, 14, 20]).int()
    out, lse, none = flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 7, 8, **options, return_attn_probs=True
    )
    assert none is None and lse.shape == (4, 12)
    for (a, b), (c, d) in zip(
        zip(cu_q[:-1], cu_q[1:], strict=True), zip(cu_k[:-1], cu_k[1:], strict=True), strict=True
    ):
        want, want_lse = attend(q[a:b], k[c:d], v[c:d], **reference_options(options))
        torch.testing.assert_close(out[a:b].double(), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse[:, a:b].double(), want_lse, rtol=0, atol=1e-5)
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 8, **options), out)


def test_queries_without_keys_give_zeros():
    q, k, v = qkv(queries=5, keys=2)
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all() and (lse[..., :3] == -math.inf).all()
    assert (out[:, 3:] != 0).all()


CACHES = {
    "seqlens": {"cache_seqlens": torch.tensor([4, 7]).int()},
    "seqlens, one number": {"cache_seqlens": 6},
    "int64": {"cache_seqlens": torch.tensor([4, 7])},
    "rows": {
        "cache_seqlens": torch.tensor([4, 7]).int(),
        "cache_batch_idx": torch.tensor([2, 0]).int(),
    },
    "leftpad": {
        "cache_seqlens": torch.tensor([4, 7]).int(),
        "cache_batch_idx": torch.tensor([1, 2]).int(),
        "cache_leftpad": torch.tensor([1, 5]).int(),
    },
}


@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("name", CACHES)
def test_cache(name, new):
    given = CACHES[name]
    queries = max(new, 1)
    q, k, v = qkv(2, queries, max(new, 1))
    caches = [torch.randn(3, 16, 2, 32) for _ in range(2)]
    used = torch.as_tensor(given["cache_seqlens"]).expand(2).tolist()
    rows = given.get("cache_batch_idx", torch.arange(2)).tolist()
    pads = given.get("cache_leftpad", torch.zeros(2)).int().tolist()
    wanted = [cache.clone() for cache in caches]
    for i, (row, at) in enumerate(zip(rows, used, strict=True)):
        for cache, x in zip(wanted, (k, v), strict=True):
            cache[row, at : at + new] = x[i, :new]
    # Columns that no row may read.
    for cache in (*caches, *wanted):
        for row, at, pad in zip(rows, used, pads, strict=True):
            cache[row, :pad] = float("nan")
            cache[row, at + new :] = float("nan")
    out, lse = flash_attn_with_kvcache(
        q, *caches, *((k, v) if new else ()), **given, causal=True, return_softmax_lse=True
    )
    for cache, want in zip(caches, wanted, strict=True):
        assert torch.equal(cache.nan_to_num(7), want.nan_to_num(7))
    for i, (row, at, pad) in enumerate(zip(rows, used, pads, strict=True)):
        seen = slice(pad, at + new)
        want, want_lse = attend(q[i], wanted[0][row, seen], wanted[1][row, seen], causal=True)
        torch.testing.assert_close(out[i].double(), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(lse[i].double(), want_lse, rtol=0, atol=1e-5)


def test_a_full_cache_needs_no_lengths():
    q, k, v = qkv(2, 1, 9)
    assert torch.equal(flash_attn_with_kvcache(q, k, v), flash_attn_func(q, k, v))


def pages_of(dense, rows, page, seed=0):
    """Caches `[rows, columns, heads, dim]` as pages in random places, and the rows' table."""
    max_pages = -(-dense[0].shape[1] // page)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(rows) * max_pages + 2, generator=generator).int()
    table = order[: len(rows) * max_pages].view(len(rows), max_pages).contiguous()
    caches = [torch.full((len(order), page, *x.shape[2:]), math.nan, dtype=x.dtype) for x in dense]
    for cache, source in zip(caches, dense, strict=True):
        for i, row in enumerate(rows):
            for column in range(source.shape[1]):
                cache[table[i, column // page], column % page] = source[row, column]
    return caches, table


@pytest.mark.parametrize("page", [1, 3, 16])
@pytest.mark.parametrize("new", [0, 1, 3])
@pytest.mark.parametrize("name", [name for name in CACHES if name != "rows"])
def test_paged_cache(name, new, page):
    """Same result as the cache in rows, and the same keys and values are written."""
    given = dict(CACHES[name])
    rows = given.pop("cache_batch_idx", torch.arange(2)).tolist()
    q, k, v = qkv(2, max(new, 1), max(new, 1))
    dense = [torch.randn(3, 16, 2, 32) for _ in range(2)]
    pages, table = pages_of(dense, rows, page)
    options = {"causal": True, "return_softmax_lse": True}
    kv = (k, v) if new else ()
    actual = flash_attn_with_kvcache(q, *pages, *kv, **given, **options, block_table=table)
    expected = flash_attn_with_kvcache(q, *dense, *kv, **CACHES[name], **options)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)
    for got, want in zip(pages, pages_of(dense, rows, page)[0], strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


def test_paged_rotary():
    angles = torch.arange(16)[:, None] * 0.5 ** torch.arange(16)
    q, k, v = qkv(2, 3, 3)
    dense = [torch.randn(2, 16, 2, 32) for _ in range(2)]
    pages, table = pages_of(dense, [0, 1], 4)
    rest = k, v, angles.cos(), angles.sin(), torch.tensor([3, 8]).int()
    options = {"causal": True, "rotary_interleaved": False}
    actual = flash_attn_with_kvcache(q, *pages, *rest, **options, block_table=table)
    assert torch.equal(actual, flash_attn_with_kvcache(q, *dense, *rest, **options))


@pytest.mark.parametrize("page", [1, 3, 16])
def test_packed_with_keys_in_pages(page):
    q, k, v = (x[0] for x in qkv(1, 12, 20))
    cu_q, cu_k = torch.tensor([0, 1, 8, 12]).int(), torch.tensor([0, 6, 14, 20]).int()
    dense = [torch.full((3, 8, 2, 32), math.nan) for _ in range(2)]
    for i, (a, b) in enumerate(zip(cu_k[:-1], cu_k[1:], strict=True)):
        dense[0][i, : b - a], dense[1][i, : b - a] = k[a:b], v[a:b]
    pages, table = pages_of(dense, [0, 1, 2], page)
    options = {"causal": True, "return_attn_probs": True}
    actual = flash_attn_varlen_func(q, *pages, cu_q, cu_k, 7, 8, **options, block_table=table)
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 7, 8, **options)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize(
    ("used", "page", "where"),
    [([15, 16], 0, r"slots\[1\]"), ([3, 4], 10**6, r"slots\[0\]"), ([3, -1], 0, r"slots\[1\]")],
)
def test_new_tokens_without_a_page_are_refused_before_a_write(used, page, where):
    q, k, v = qkv(2, 1, 1)
    pages, table = pages_of([torch.randn(2, 16, 2, 32) for _ in range(2)], [0, 1], 4)
    table[0, used[0] // 4] += page
    before = [x.clone() for x in pages]
    with pytest.raises(ValueError, match=f"append_kv: {where} must be in"):
        flash_attn_with_kvcache(
            q, *pages, k, v, cache_seqlens=torch.tensor(used).int(), block_table=table
        )
    for got, want in zip(pages, before, strict=True):
        assert torch.equal(got.nan_to_num(7), want.nan_to_num(7))


@pytest.mark.parametrize("new", [1, 4])
def test_rotary(new):
    """Keys and queries rotate by their column, in the half-split layout."""
    q, k, v = qkv(2, new, new)
    angles = torch.arange(16)[:, None] * 0.5 ** torch.arange(16)
    cos, sin = angles.cos(), angles.sin()
    lengths = torch.tensor([3, 8])
    caches = [torch.randn(2, 16, 2, 32) for _ in range(2)]
    before = [cache.clone() for cache in caches]
    out = flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, lengths.int(), causal=True, rotary_interleaved=False
    )

    def turn(x, at):
        c, s = (t[at : at + new, None].double() for t in (cos, sin))
        first, second = x.double().chunk(2, -1)
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    for row, at in enumerate(lengths.tolist()):
        keys = torch.cat([before[0][row, :at].double(), turn(k[row], at)])
        values = torch.cat([before[1][row, :at], v[row]])
        want, _ = attend(turn(q[row], at), keys, values, causal=True)
        torch.testing.assert_close(out[row].double(), want, rtol=0, atol=1e-5)
        torch.testing.assert_close(caches[0][row, : at + new].double(), keys, rtol=0, atol=1e-5)


def test_half_precision_is_that_of_the_op():
    q, k, v = qkv(dtype=torch.bfloat16)
    out = flash_attn_func(q, k, v, causal=True)
    assert out.dtype == torch.bfloat16
    want, _ = attend(q[0], k[0], v[0], causal=True)
    torch.testing.assert_close(out[0].double(), want, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", flash.__all__)
def test_docstrings_name_the_arguments(name):
    function = getattr(flash, name)
    text = inspect.cleandoc(function.__doc__)
    for argument in inspect.signature(function).parameters:
        assert f"\n    {argument}: " in text, argument


def call(name, q=None, **options):
    queries, k, v = qkv()
    q = queries if q is None else q
    if name == "varlen":
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        bounds = [torch.tensor([0, n, 2 * n]).int() for n in (5, 9)]
        return flash_attn_varlen_func(q, k, v, *bounds, 5, 9, **options)
    return {"func": flash_attn_func, "kvcache": flash_attn_with_kvcache}[name](q, k, v, **options)


REFUSED = [
    ("func", {"dropout_p": 0.1}, NotImplementedError, "flash_attn_func: dropout_p must be 0"),
    ("varlen", {"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
    ("func", {"window_size": (2, 1)}, NotImplementedError, r"window_size must end.*\(2, 1\)"),
    ("func", {"alibi_slopes": torch.ones(2, 4)}, NotImplementedError, "alibi_slopes must be"),
    ("varlen", {"block_table": torch.zeros(2, 2).int()}, ValueError, "k must be .batch, tokens"),
    ("kvcache", {"block_table": torch.zeros(2, 2)}, TypeError, "block_table must be int32"),
    ("kvcache", {"block_table": torch.zeros(3, 2).int()}, ValueError, "block_table must be of sh"),
    ("kvcache", {"block_table": torch.zeros(2, 0).int()}, ValueError, "at least one page of"),
    (
        "kvcache",
        {"block_table": torch.zeros(2, 2).int(), "cache_batch_idx": torch.zeros(2).int()},
        ValueError,
        "cache_batch_idx must be None with block_table",
    ),
    ("kvcache", {"k": torch.zeros(2, 1, 2, 32)}, ValueError, "k and v must be given together"),
    (
        "kvcache",
        {"k": torch.zeros(2, 1, 2, 32), "v": torch.zeros(2, 1, 2, 32)},
        ValueError,
        "cache_seqlens must be given with k",
    ),
    (
        "kvcache",
        {"rotary_cos": torch.zeros(9, 16), "rotary_sin": torch.zeros(9, 16)},
        NotImplementedError,
        "rotary_interleaved must be False",
    ),
    (
        "kvcache",
        {
            "rotary_cos": torch.zeros(9, 16),
            "rotary_sin": torch.zeros(9, 16),
            "rotary_interleaved": False,
            "cache_leftpad": torch.zeros(2).int(),
        },
        NotImplementedError,
        "cache_leftpad must be None with rotary_cos",
    ),
    ("kvcache", {"rotary_cos": torch.zeros(9, 16)}, ValueError, "must be given together"),
    ("func", {"q": torch.zeros(2, 5, 32)}, ValueError, r"q must be \[batch, tokens, heads"),
    ("func", {"softcap": -1.0}, ValueError, "softcap must be"),
]


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED)
def test_refused(name, options, error, message):
    with pytest.raises(error, match=message):
        call(name, **options)
