"""Block tables: a row's columns in arbitrary pages give the same bits as in a slot."""

import math

import pytest
import torch
from paged import LAYOUTS, paged_problem

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    Accuracy,
    assert_same_bits,
    attention_problem,
    before_a_hole,
    cpu_threads,
    int32,
    nan_in_empty,
    random_attention_problem,
    random_rows,
)

PAGES = [1, 7, 16, 32, 128]
EVERYTHING = {"window": 40, "softcap": 15.0, "scale": 0.3, "alibi": True, "sinks": True}
# Query lengths, lengths, (num_heads, num_kv_heads), head_dim, options ("alibi", "sinks": flags).
CASES = {
    "decode": ([1, 1, 1, 1], [1, 63, 128, 1000], (4, 2), 64, {}),
    "prefill": ([1, 63, 128], [1, 63, 128], (4, 2), 64, {}),
    "mixture": ([1, 17, 0, 40, 1], [700, 90, 30, 40, 0], (4, 4), 32, {}),
    "chunk of a long row": ([70], [1300], (2, 1), 64, {}),
    "several tokens": ([2, 4, 3], [513, 1025, 511], (8, 2), 64, {}),
    "more queries than tokens": ([3, 40], [1, 30], (4, 2), 64, {}),
    "mqa": ([1, 33], [600, 33], (8, 1), 128, {}),
    "large group": ([1, 5], [600, 70], (40, 1), 16, {}),
    "head_dim 24": ([1, 9], [130, 31], (4, 2), 24, {"softcap": 5.0}),
    "head_dim 80": ([1, 9], [530, 31], (4, 2), 80, {"window": 7}),
    "head_dim 256": ([1, 9], [330, 31], (4, 2), 256, {"scale": 0.02}),
    "both ways": ([1, 9, 63], [530, 31, 63], (4, 2), 64, {"causal": False}),
    "everything": ([1, 9, 63], [1000, 131, 63], (9, 3), 64, EVERYTHING),
}


@pytest.fixture
def judged(request):
    """Whether every access is judged, which is slow."""
    return request.node.callspec.params["ops"].name == "cuda-judged"


def case(name, dtype=torch.float32, **placement):
    query_lengths, lengths, (num_heads, num_kv_heads), head_dim, options = CASES[name]
    problem = random_attention_problem(
        query_lengths, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, **placement,
    )  # fmt: skip
    options = {**options, "return_lse": True}
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, num_heads + 1)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 3.0, num_heads)
    return problem, options


def check(ops, dense, *tables, **options):
    """In each of these pages same bits as the dense op; no result is NaN."""
    expected = ops.ragged_attention(*dense.args, **options)
    for pages in tables:
        with nan_in_empty():
            actual = ops.ragged_attention(**pages.arguments, **options)
        for got, want, what in zip(actual, expected, ("out", "lse"), strict=True):
            assert not want.isnan().any()
            assert_same_bits(got, want, what)


# 1. The dense op and the reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_dense(ops, name, dtype, judged):
    dense, options = case(name, dtype)
    pages = PAGES[::2] if judged else PAGES
    check(ops, dense, *(paged_problem(dense, page) for page in pages), **options)


# CUDA's kernels look every page up, wherever the next one is.
@pytest.mark.full(where=lambda case: case["ascending"] and case["ops"].name.startswith("cuda"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(ops, layout, ascending, dtype, judged):
    """Pages that follow each other in memory are read as one run if the strides allow it."""
    for name in ("mixture", "chunk of a long row"):
        dense, options = case(name, dtype)
        sizes = (16,) if judged and name != "mixture" else (1, 16, 128)
        tables = [
            paged_problem(dense, page, layout=layout, ascending=ascending, margins=margins)
            for page in sizes
            for margins in (None, (0, 0, 0, 0))
        ]
        check(ops, dense, *tables, **options)


@pytest.mark.parametrize("start", [0, 1, 15, 16, 63, 64, 100])
def test_starts(ops, start, judged):
    """Blocks of keys begin at any column of a page."""
    dense = random_attention_problem([1, 20], [400, 90], starts=[start, start], capacity=500)
    pages = PAGES[::2] if judged else PAGES
    check(ops, dense, *(paged_problem(dense, page) for page in pages), return_lse=True)


@pytest.mark.full
@pytest.mark.parametrize("length", [131072, 131073])
def test_long_rows(ops, length):
    """CUDA's lanes know the pages of 32 steps of a warp, which longer rows exceed."""
    dense = random_attention_problem(
        [1], [length], num_heads=2, num_kv_heads=1, head_dim=64, dtype=torch.bfloat16
    )
    check(ops, dense, paged_problem(dense, 16), return_lse=True)


@pytest.mark.parametrize("name", CASES)
def test_the_reference(name):
    dense, options = case(name)
    expected = reference.ragged_attention(*dense.args, **options)
    for page in (1, 7, 64):
        pages = paged_problem(dense, page)
        actual = reference.ragged_attention(**pages.arguments, **options)
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mixture", "everything"])
def test_matches_reference(ops, name, dtype):
    dense, options = case(name, dtype)
    pages = paged_problem(dense, 16)
    caches = pages.query, pages.key_cache, pages.value_cache
    rest = dict(list(pages.arguments.items())[3:])
    accuracy = Accuracy("ragged_attention", *caches, **rest, **options)
    accuracy.check(ops.ragged_attention(**pages.arguments, **options))


# 2. Edges.


def test_no_rows(ops):
    cache, none = torch.randn(3, 2, 16, 64), int32([])
    for table in (none.view(0, 0), none.view(0, 5)):
        out, lse = ops.ragged_attention(
            torch.empty(0, 4, 64), cache, cache, lengths=none, block_table=table, return_lse=True
        )
        assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.parametrize("pages", [0, 2])
def test_rows_without_columns(ops, pages):
    """Neither pages nor a table are needed."""
    cache = torch.randn(pages, 2, 16, 64)
    out, lse = ops.ragged_attention(
        torch.randn(3, 4, 64), cache, cache, lengths=int32([0, 0, 0]),
        block_table=torch.empty(3, 0, dtype=torch.int32), return_lse=True,
    )  # fmt: skip
    assert (out == 0).all() and (lse == -math.inf).all()


def test_arguments_left_out(ops):
    """One token per row, rows from column 0; slots are ignored, including wrong ones."""
    dense = random_attention_problem([1, 1], [40, 77], starts=[0, 0])
    pages = paged_problem(dense, 16)
    expected = ops.ragged_attention(*dense.args)
    for slots in (None, int32([-5, 10**6]), int32([1])):
        actual = ops.ragged_attention(
            pages.query, pages.key_cache, pages.value_cache, None, slots, lengths=pages.lengths,
            block_table=pages.block_table,
        )  # fmt: skip
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_share_pages(ops, dtype):
    """A prefix that two rows name is as good as two copies of it."""
    rows = random_rows([1, 30], [100, 130], dtype=dtype)
    rows[1].key[:96], rows[1].value[:96] = rows[0].key[:96], rows[0].value[:96]
    dense = attention_problem(rows, starts=[0, 0])
    pages = paged_problem(dense, 32)
    pages.block_table[1, :3] = pages.block_table[0, :3]
    check(ops, dense, pages, return_lse=True)


def test_strided_table(ops):
    """Rows of a table may be any distance apart, including 0."""
    dense = random_attention_problem([1, 1], [90, 90], starts=[0, 0])
    pages = paged_problem(dense, 16)
    pages.block_table = pages.block_table[:1].expand(2, -1)
    dense.slots = dense.slots[:1].expand(2).contiguous()
    check(ops, dense, pages, return_lse=True)


def test_optionals_that_change_nothing(ops):
    dense, options = case("mixture")
    pages = paged_problem(dense, 16)
    for spare in ({"max_query_length": 40, "max_length": 700}, {"max_length": 10**6}):
        check(ops, dense, pages, **options, **spare)


def test_out(ops):
    dense, options = case("mixture")
    pages = paged_problem(dense, 16)
    expected = ops.ragged_attention(*dense.args, **options)
    out = tuple(torch.full_like(x, math.nan) for x in expected)
    ops.ragged_attention(**pages.arguments, **options, out=out)
    alone = torch.full_like(expected[0], math.nan)
    ops.ragged_attention(**pages.arguments, out=alone)
    for got, want in zip((*out, alone), (*expected, expected[0]), strict=True):
        assert_same_bits(got, want)


# 3. Poison and batch invariance. `paged_problem` poisons everything that no row owns.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "length"), [(1, 77), (20, 33), (1, 520), (70, 129)])
def test_nothing_is_loaded_from_behind_the_pages(ops, tokens, length, dtype):
    """The last page ends where memory ends, and the row's last column is its last column."""
    for page in (1, 11, 64):
        start = -length % page
        dense = random_attention_problem(
            [tokens], [length], starts=[start], capacity=start + length, dtype=dtype
        )
        pages = paged_problem(dense, page, ascending=True, margins=(0, 0, 0, 0))
        expected = ops.ragged_attention(*dense.args)
        pages.key_cache, pages.value_cache = map(
            before_a_hole, (pages.key_cache, pages.value_cache)
        )
        assert_same_bits(ops.ragged_attention(**pages.arguments), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_values_in_pages(ops, dtype):
    """Tokens before the poison have the bits without it, both with pages and without."""
    (row,) = random_rows([30], [100], dtype=dtype)
    clean = ops.ragged_attention(*attention_problem([row]).args)
    row.value[90, 0, 3] = math.nan
    dense = attention_problem([row])
    for page in PAGES:
        actual = ops.ragged_attention(**paged_problem(dense, page).arguments)
        assert_same_bits(actual[:20], clean[:20])
        assert_same_bits(actual, ops.ragged_attention(*dense.args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(ops, dtype):
    rows = random_rows([1, 17, 1, 70, 1], [700, 90, 30, 80, 1500], dtype=dtype)
    batch = attention_problem(rows)
    with cpu_threads(1):
        expected = batch.split(ops.ragged_attention(*batch.args))
    everyone = list(range(len(rows)))
    batches = [everyone[::-1], everyone[1::2], *([i] for i in everyone)]
    for seed, members in enumerate(batches):
        dense = attention_problem([rows[i] for i in members], seed=seed)
        pages = paged_problem(dense, PAGES[seed % 5], layout=LAYOUTS[seed % 3], seed=seed)
        with cpu_threads(1 + seed % 2):
            actual = dense.split(ops.ragged_attention(**pages.arguments))
        for place, i in enumerate(members):
            assert_same_bits(actual[place], expected[i], f"row {i} in batch {members}")


# 4. torch.compile.


@pytest.mark.parametrize("overload", ["options", "lse", "out", "lse_out"])
def test_opcheck(overload):
    dense, options = case("everything")
    del options["return_lse"]
    given = paged_problem(dense, 16).arguments | {"slots": None} | options
    # Any finite padding: opcheck compares results of the same call.
    results = {}
    if overload.endswith("out"):
        results["out"] = torch.empty(given["query"].shape)
    if overload == "lse_out":
        results["lse"] = torch.empty(given["query"].shape[:2])
    op = getattr(torch.ops.baton_kernels.ragged_attention, overload)
    torch.library.opcheck(op, (), given | results)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile(return_lse):
    compiled = torch.compile(baton_kernels.ragged_attention, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 50], [8, 200], [80, 2]):
        pages = paged_problem(random_attention_problem([2, 1], lengths), 16)
        expected = baton_kernels.ragged_attention(**pages.arguments, return_lse=return_lse)
        actual = compiled(**pages.arguments, return_lse=return_lse)
        for got, want in zip(
            *((x if return_lse else (x,)) for x in (actual, expected)), strict=True
        ):
            assert_same_bits(got, want)


# 5. By hand, and how a paged cache is used.


def test_by_hand(ops):
    # Row 0: keys in pages 2 and 0, of two columns each, from column 1 on: 3 valid columns.
    key_cache = torch.full((3, 1, 2, 16), math.nan)
    value_cache = key_cache.clone()
    key_cache[2, 0, 1], key_cache[0, 0] = 0.0, 0.0
    key_cache[0, 0, 1, 0] = 1.0
    value_cache[2, 0, 1], value_cache[0, 0, 0], value_cache[0, 0, 1] = 8.0, 2.0, 4.0
    query = torch.zeros(1, 1, 16)
    query[0, 0, 0] = math.log(2.0)
    out, lse = ops.ragged_attention(
        query, key_cache, value_cache, starts=int32([1]), lengths=int32([3]),
        block_table=int32([2, 0]).view(1, 2), scale=1.0, return_lse=True,
    )  # fmt: skip
    # Weights 1, 1 and 2.
    torch.testing.assert_close(out[0, 0, 3], torch.tensor((8.0 + 2.0 + 2 * 4.0) / 4))
    torch.testing.assert_close(lse[0, 0], torch.tensor(math.log(4.0)))


@pytest.mark.parametrize("page", [1, 16])
def test_append_kv_writes_pages(ops, page):
    """A page is a slot: token at column c goes to slot table[row, c // page], column c % page."""
    # The emulated tiles have no append_kv; without tiles, it needs no emulation.
    append_kv = getattr(ops, "append_kv", baton_kernels.append_kv)
    rows, steps = 3, 20
    generator = torch.Generator().manual_seed(0)
    dense = torch.zeros(2, rows, 2, 2 * steps, 64)
    pages = torch.full((2, 2 * rows * (2 * steps // page + 1), 2, page, 64), math.nan)
    table = torch.randperm(pages.shape[1], generator=generator).int()
    table = table[: rows * (2 * steps // page + 1)].view(rows, -1)
    lengths = int32([0, 5, 19])
    first = torch.randn(2, rows, 19, 2, 64, generator=generator)
    everyone = torch.arange(rows)
    for column in range(19):
        # Prompts: several tokens of a row are several rows of append_kv.
        has = lengths > column
        at = torch.full((int(has.sum()),), column, dtype=torch.int32)
        key, value = first[:, has, column]
        append_kv(key, value, *dense, everyone[has].int(), at)
        append_kv(key, value, *pages, table[has, column // page], at % page)
    for _ in range(steps):
        key, value = torch.randn(2, rows, 2, 64, generator=generator)
        query = torch.randn(rows, 4, 64, generator=generator)
        angle = torch.rand(rows, 32, generator=generator)
        rotary = {"query": query, "cos": angle.cos(), "sin": angle.sin()}
        expected = append_kv(key, value, *dense, None, lengths, **rotary)
        where = table[everyone, lengths // page]
        rotated = append_kv(key, value, *pages, where, lengths % page, **rotary)
        lengths = lengths + 1
        assert_same_bits(
            ops.ragged_attention(rotated, *pages, lengths=lengths, block_table=table),
            ops.ragged_attention(expected, *dense, lengths=lengths),
        )
