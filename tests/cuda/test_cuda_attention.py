"""How ragged_attention's CUDA kernels divide rows and share a device, and that no result shows it.

| property | test |
| --- | --- |
| a row's segments have the same bits in separate blocks and one after another | streamed |
| rows of many vectors are split, and a single row into enough pieces | pieces |
| a value that is not finite gives the same bits for every probability and every cut | vanishing |
| no grid grows with the capacity or with rows that do not exist | grids |
"""

import math

import pytest
import torch
from watched_ops import WatchedOps, with_idle_row

from baton_kernels.testing import (
    Row,
    assert_accurate,
    assert_same_bits,
    attention_problem,
    int32,
    random_rows,
)
from emulation.cuda.backends import EMULATED

# Query tokens, length, (num_heads, num_kv_heads), head_dim, dtype, options.
STREAMED = {
    "bfloat16": (20, 1100, (8, 2), 64, torch.bfloat16, {}),
    "tile ends in two segments": (40, 1040, (4, 2), 128, torch.float16, {}),
    "head_dim 96": (9, 700, (2, 2), 96, torch.bfloat16, {}),
    "head_dim 256": (9, 1100, (4, 1), 256, torch.bfloat16, {"window": 600}),
    "window": (24, 1200, (4, 1), 80, torch.float16, {"window": 300}),
    "both ways": (20, 1100, (4, 2), 64, torch.bfloat16, {"causal": False, "softcap": 3.0}),
    "float32": (9, 1100, (4, 2), 64, torch.float32, {}),
    "head_dim 24": (9, 1100, (4, 2), 24, torch.bfloat16, {"window": 530}),
}


@pytest.mark.parametrize("name", STREAMED)
def test_streamed_segments_have_the_bits_of_split_ones(name):
    tokens, length, (num_heads, num_kv_heads), head_dim, dtype, options = STREAMED[name]
    rows = random_rows(
        [tokens, 1], [length, 600], num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    problem = attention_problem(rows)
    options = {**options, "return_lse": True}
    ops = WatchedOps()
    with ops.entered():
        split = ops.ragged_attention(*problem.args, **options)
        vectors = ops.partial_results(head_dim)
        streamed = ops.ragged_attention(*with_idle_row(problem, num_heads), **options)
    assert vectors > num_heads * tokens
    assert_accurate(split, "ragged_attention", *problem.args, **options)
    for got, want in zip(streamed, split, strict=True):
        assert_same_bits(got[: len(want)], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_infinite_value_of_a_vanishing_probability_does_not_depend_on_the_cut(dtype, value):
    """Key 3 has 2^-30 of the largest probability: 0 in float16, and 0 times infinity is NaN.

    Token 64 sees all of the first tile, which is at the border for tokens before it.
    """
    (row,) = random_rows([65], [65], num_heads=2, num_kv_heads=1, dtype=dtype)
    row.query[64], row.key[:64] = 0.0, 0.0
    row.query[64, :, 0], row.key[3, 0, 0] = 1.0, -30 * math.log(2.0)
    row.value[3, 0, 5] = value
    results = []
    for tokens in (2, 3, 9, 65):
        cut = attention_problem([Row(row.query[65 - tokens :], row.key, row.value)])
        for ops in EMULATED.values():
            with ops.entered():
                out, lse = ops.ragged_attention(*cut.args, scale=1.0, return_lse=True)
            results.append((out[-1], lse[-1]))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert_same_bits(got, want)
    kept = math.isinf(value) and dtype == torch.bfloat16
    assert (results[0][0][:, 5] == value).all() if kept else results[0][0][:, 5].isnan().all()


# Query tokens, length, (num_heads, num_kv_heads), head_dim, pieces of each vector's keys.
PIECES = {
    "one token": (1, 2048, (8, 2), 64, 8),
    "one token of many heads": (1, 1100, (128, 1), 64, 5),
    "chunk of 160 vectors": (40, 1100, (8, 2), 64, 3),
    "short": (1, 256, (8, 2), 64, 0),
    "chunk in one segment": (3, 512, (8, 2), 64, 0),
    "chunk of 256 dims": (3, 1100, (8, 2), 256, 3),
    "in 16 as long as they are not longer than 512": (1, 8192, (2, 1), 64, 16),
}


@pytest.mark.parametrize("name", PIECES)
def test_rows_are_read_in_pieces(name):
    tokens, length, (num_heads, num_kv_heads), head_dim, pieces = PIECES[name]
    (row,) = random_rows(
        [tokens], [length], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=torch.bfloat16,
    )  # fmt: skip
    ops, problem = WatchedOps(), attention_problem([row])
    with ops.entered():
        actual = ops.ragged_attention(*problem.args)
    assert_accurate(actual, "ragged_attention", *problem.args)
    assert ops.partial_results(head_dim) == pieces * tokens * num_heads


def shape_of(rows: int, capacity: int, query_length: int):
    """Rows of one slot; nothing in it is long."""
    cache = torch.zeros(1, 1, 2, 1, 64, dtype=torch.bfloat16).expand(-1, -1, -1, capacity, -1)[0]
    query = torch.zeros(rows * query_length, 8, 64, dtype=torch.bfloat16)
    return query, cache, cache, int32(range(0, rows * query_length + 1, query_length)), *(
        int32([x] * rows) for x in (0, 0, query_length)
    )  # fmt: skip


@pytest.mark.parametrize("query_length", [1, 3])
def test_grids_do_not_grow_with_the_capacity(query_length):
    """The launches of a graph captured without bounds: blocks for 2 multiprocessors, and a warp for
    each vector that may be split."""
    ops, grids = WatchedOps(), []
    for capacity in (4096, 2**20):
        with ops.entered():
            ops.ragged_attention(*shape_of(40, capacity, query_length))
        grids.append(dict(ops.launches))
    assert grids[0] == grids[1]
    # Two KV heads; 4 blocks of decode and 3 of prefill fit a multiprocessor.
    assert grids[0]["decode"] == (4, 2, 1) and grids[0]["prefill"] == (3, 2, 1)
    assert grids[0]["merge"] == (40 * query_length, 2, 1)


def test_bounds_and_default_bounds_leave_launches_out():
    ops = WatchedOps()
    query, key, value, bounds, *rest = shape_of(40, 4096, 1)
    with ops.entered():
        ops.ragged_attention(query, key, value, bounds, *rest, max_query_length=1)
        assert ops.launched == ["decode", "merge"]
        ops.ragged_attention(query, key, value, bounds, *rest, max_query_length=1, max_length=256)
        assert ops.launched == ["decode"]


@pytest.mark.parametrize("backend", EMULATED)
def test_more_rows_than_a_warp_looks_at_together(backend):
    """Rows of both kinds, split or not, some out of range: 70 of them."""
    lengths = [(37 * i) % 600 + 4 for i in range(70)]
    counts = [1 if i % 3 else 3 for i in range(70)]
    rows = random_rows(
        counts, lengths, num_heads=2, num_kv_heads=1, head_dim=64, dtype=torch.bfloat16
    )
    alone = Row(rows[69].query, rows[69].key, rows[69].value)
    problem = attention_problem(rows)
    ops = EMULATED[backend]
    with ops.entered():
        actual = ops.ragged_attention(*problem.args)
        (last,) = attention_problem([alone]).split(
            ops.ragged_attention(*attention_problem([alone]).args)
        )
    assert_accurate(actual, "ragged_attention", *problem.args)
    assert_same_bits(problem.split(actual)[69], last)
