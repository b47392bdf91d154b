"""Rows whose keys and values are in one place get the bits that they get from separate copies.

The CPU reads such keys once for all rows, where whole segments (512 keys at first) are shared.
"""

import itertools
import math

import pytest
import torch
from judged import on_emulated_tiles
from paged import paged_problem

from baton_kernels.testing import (
    DTYPES,
    Row,
    assert_same_bits,
    attention_problem,
    cpu_threads,
    int32,
    random_rows,
)

# On other backends every row reads its keys separately, shared or not.
ONLY_ON = "cpu-"

EVERYTHING = {"softcap": 15.0, "scale": 0.3, "alibi": True, "sinks": True}
# Query lengths, lengths, (num_heads, num_kv_heads), head_dim, options ("alibi", "sinks": flags).
# Each segment of 512 that lies within several rows is shared by all of them.
CASES = {
    "two rows": ([1, 1], [600, 700], (4, 2), 64, {}),
    "ends of segments": ([1, 1, 1, 1, 1], [511, 512, 513, 1024, 1025], (4, 2), 64, {}),
    "more than a tile": ([1] * 20, [1100 + 7 * i for i in range(20)], (8, 2), 32, {}),
    "several tokens": ([2, 9, 1, 30], [600, 520, 515, 1030], (4, 2), 64, {}),
    "prefill among them": ([1, 70, 1], [600, 1100, 1100], (4, 2), 64, {}),
    "a row without tokens": ([1, 0, 1], [600, 1100, 1100], (4, 2), 64, {}),
    "large group": ([1, 1, 1], [530, 600, 512], (40, 1), 16, {}),
    "group larger than a tile": ([1, 1], [530, 600], (70, 1), 16, {}),
    "head_dim 24": ([1, 1, 1], [530, 600, 512], (4, 2), 24, {}),
    "head_dim 128": ([1, 1, 1], [530, 1600, 1512], (4, 1), 128, {}),
    "window": ([1, 3, 1, 1], [1030, 900, 600, 530], (4, 2), 64, {"window": 400}),
    "small window": ([1, 3, 1, 1], [1030, 516, 600, 530], (4, 2), 64, {"window": 9}),
    "both ways": ([1, 9, 1], [600, 516, 530], (4, 2), 64, {"causal": False}),
    "everything": ([1, 9, 1], [600, 516, 1100], (9, 3), 64, EVERYTHING),
}


def rows_of(name, dtype):
    """Each row's keys are the beginning of one list; queries differ per row."""
    query_lengths, lengths, (num_heads, num_kv_heads), head_dim, options = CASES[name]
    rows = random_rows(
        query_lengths, [max(lengths)] * len(lengths), num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype,
    )  # fmt: skip
    key, value = rows[0].key, rows[0].value
    options = {**options, "return_lse": True}
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, num_heads + 1)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 3.0, num_heads)
    return [
        Row(row.query, key[:length], value[:length])
        for row, length in zip(rows, lengths, strict=True)
    ], options


def assert_equal(actual, expected, what):
    for got, want, name in zip(actual, expected, ("out", "lse"), strict=True):
        assert not want.isnan().any()
        assert_same_bits(got, want, f"{name}, {what}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_one_slot(ops, name, dtype):
    rows, options = rows_of(name, dtype)
    expected = ops.ragged_attention(*attention_problem(rows).args, **options)
    count = len(rows)
    # All rows in one place, and two places whose rows are interleaved.
    for slots, starts in (
        ([1] * count, [3] * count),
        ([0] * count, [0] * count),
        ([i % 2 for i in range(count)], [5 * (i % 2) for i in range(count)]),
    ):
        one = attention_problem(rows, slots=slots, starts=starts, num_slots=2)
        for threads in (1, 2):
            with cpu_threads(threads):
                actual = ops.ragged_attention(*one.args, **options)
            assert_equal(actual, expected, f"slots {slots}")


@pytest.mark.full(where=on_emulated_tiles(lambda case: case["page"] != 7))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page", [1, 7, 16, 128])
@pytest.mark.parametrize("name", ["ends of segments", "several tokens", "more than a tile"])
def test_pages(ops, name, page, dtype):
    rows, options = rows_of(name, dtype)
    lengths = [len(row.key) for row in rows]
    for start in (0, 3):
        dense = attention_problem(rows, starts=[start] * len(rows))
        expected = ops.ragged_attention(*dense.args, **options)
        longest = lengths.index(max(lengths))
        some = [length * (i % 2) for i, length in enumerate(lengths)]
        for prefixes in (lengths, [min(length, 600) for length in lengths], some):
            pages = paged_problem(dense, page)
            # The longest row has all pages that the others can name.
            table = pages.block_table
            for row, prefix in enumerate(prefixes):
                whole = (start + prefix) // page
                table[row, :whole] = table[longest, :whole]
            actual = ops.ragged_attention(**pages.arguments, **options)
            assert_equal(actual, expected, f"prefixes {prefixes}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_slots_that_differ_in_one_place(ops, dtype):
    """Rows of one slot with different starts, or of different slots with one start, share
    nothing."""
    rows = random_rows([1] * 4, [600] * 4, dtype=dtype)
    expected = ops.ragged_attention(*attention_problem(rows).args)
    problem = attention_problem(
        rows, slots=[0, 0, 1, 1], starts=[0, 600, 0, 601], num_slots=2, capacity=1210
    )
    assert_same_bits(ops.ragged_attention(*problem.args), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_values_of_a_shared_segment(ops, dtype):
    """Keys hidden from one row's tokens may be visible to another's."""
    rows, _ = rows_of("several tokens", dtype)
    rows = [Row(rows[1].query, rows[1].key[:512], rows[1].value[:512]), rows[0], rows[3]]
    clean = ops.ragged_attention(*attention_problem(rows).args)
    for row in rows:
        row.value[508, 0, 3] = math.nan
    problem = attention_problem(rows, slots=[0] * 3, starts=[2] * 3, num_slots=1)
    actual = ops.ragged_attention(*problem.args)
    # Tokens 0 to 4 of the first row are at positions below 508.
    assert_same_bits(actual[:5], clean[:5])
    assert actual[5:, :2, 3].isnan().all()
    assert not actual[:, 2:].isnan().any()


def test_tables_that_stop_sharing(ops):
    """The same rows in the same tensors: what was shared before is not, then is again."""
    (first, second) = random_rows([1, 1], [1100, 1100])
    common = [first, Row(second.query, first.key, first.value)]
    apart = attention_problem([first, second], starts=[0, 0], slots=[0, 1])
    pages = paged_problem(apart, 16)
    own = pages.block_table.clone()
    shared = own.clone()
    shared[1] = shared[0]
    expected = {
        False: ops.ragged_attention(*apart.args),
        True: ops.ragged_attention(*attention_problem(common, starts=[0, 0]).args),
    }
    for is_shared in itertools.islice(itertools.cycle([True, False, False, True]), 8):
        pages.block_table.copy_(shared if is_shared else own)
        actual = ops.ragged_attention(**pages.arguments)
        assert_same_bits(actual, expected[is_shared], f"shared: {is_shared}")


def test_rows_that_leave_a_shared_slot(ops):
    rows, options = rows_of("two rows", torch.float32)
    one = attention_problem(rows, slots=[1, 1], starts=[0, 0], num_slots=3, capacity=800)
    expected = ops.ragged_attention(*attention_problem(rows).args, **options)
    assert_equal(ops.ragged_attention(*one.args, **options), expected, "together")
    one.key_cache[2], one.value_cache[2] = one.key_cache[1], one.value_cache[1]
    one.slots = int32([1, 2])
    assert_equal(ops.ragged_attention(*one.args, **options), expected, "apart")
