"""Eight-bit keys and values: relative to what they represent as accurate as other dtypes, and the
same bits however rows are cut, paged, shared and placed."""

import random

import pytest
import torch
from eight_bit import EIGHT_BITS, eight_bit_problem, pages_of
from judged import on_emulated_tiles

import baton_kernels
from baton_kernels.reference._eight_bit import dequantize
from baton_kernels.testing import (
    DTYPES,
    Accuracy,
    Refusal,
    Row,
    assert_same_bits,
    attention_problem,
    before_a_hole,
    cpu_threads,
    int32,
    nan_in_empty,
    random_attention_problem,
    random_rows,
    twin,
)

ONLY_ON = "cpu-"
EVERYTHING = {"window": 40, "softcap": 15.0, "scale": 0.3, "alibi": True, "sinks": True}
# Query lengths, lengths, (num_heads, num_kv_heads), head_dim, options ("alibi", "sinks": flags).
CASES = {
    "decode": ([1, 1, 1, 1], [1, 63, 128, 1000], (4, 2), 64, {}),
    "prefill": ([1, 63, 128], [1, 63, 128], (4, 2), 64, {}),
    "mixture": ([1, 17, 0, 40, 1], [700, 90, 30, 40, 0], (4, 4), 32, {}),
    "chunk of a long row": ([70], [1300], (2, 1), 64, {}),
    "more queries than tokens": ([3, 40], [1, 30], (4, 2), 64, {}),
    "mqa": ([1, 33], [600, 33], (8, 1), 128, {}),
    "large group": ([1, 5], [600, 70], (40, 1), 16, {}),
    "head_dim 24": ([1, 9], [130, 31], (4, 2), 24, {"softcap": 5.0}),
    "head_dim 80": ([1, 9], [530, 31], (4, 2), 80, {"window": 7}),
    "head_dim 256": ([1, 9], [330, 31], (4, 2), 256, {"scale": 0.02}),
    "both ways": ([1, 9, 63], [530, 31, 63], (4, 2), 64, {"causal": False}),
    "everything": ([1, 9, 63], [1000, 131, 63], (9, 3), 64, EVERYTHING),
}


def options_of(name):
    num_heads, options = CASES[name][2][0], dict(CASES[name][4])
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, num_heads + 1)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 3.0, num_heads)
    return {**options, "return_lse": True}


def case(name, dtype, stored, **placement):
    query_lengths, lengths, (num_heads, num_kv_heads), head_dim, _ = CASES[name]
    dense = random_attention_problem(
        query_lengths, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, **placement,
    )  # fmt: skip
    return eight_bit_problem(dense, stored), options_of(name)


def attend(ops, arguments, **options):
    with nan_in_empty():
        return ops.ragged_attention(**arguments, **options)


# 1. Accurate relative to what the elements represent.


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference(ops, name, dtype, stored):
    problem, options = case(name, dtype, stored)
    arguments = dict(problem.arguments)
    positional = [arguments.pop(name) for name in ("query", "key_cache", "value_cache")]
    truth = Accuracy("ragged_attention", *positional, **arguments, **options)
    truth.check(attend(ops, problem.arguments, **options))


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number(ops, dtype, stored):
    """One key per eight-bit number: a query with a single 1 has that number as its score."""
    numbers = torch.arange(256).to(torch.uint8).view(stored)
    cache = torch.zeros(256, 1, 1, 16, dtype=torch.int8).view(stored)
    cache[:, 0, 0, 3] = numbers
    query = torch.zeros(256, 1, 16, dtype=dtype)
    query[:, 0, 3] = 1.0
    scale = torch.full((256, 1, 1), 0.5)
    out, lse = ops.ragged_attention(
        query, cache, cache, lengths=int32([1] * 256), scale=1.0, return_lse=True,
        key_scale=scale, value_scale=scale,
    )  # fmt: skip
    expected = numbers.float() * 0.5
    seen = ~expected.isnan()
    assert torch.equal(lse[seen, 0], expected[seen])
    assert torch.equal(out[seen, 0, 3].float(), expected[seen])
    assert out[~seen, 0, 3].isnan().all() and (~seen).sum() == (2 if stored != torch.int8 else 0)


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two(ops, dtype, stored):
    """A power of two in query or in the scales of values appears in scores or out."""
    problem, options = case("mixture", dtype, stored)
    arguments = dict(problem.arguments)
    out, lse = attend(ops, arguments, **options)
    largest = 6 if dtype == torch.float16 else 100
    for power in (-largest, largest):
        factor = 2.0**power
        # float16 numbers near 0 would lose bits.
        of_query = 1.0 if dtype == torch.float16 else factor
        other = arguments | {
            "query": arguments["query"] * of_query,
            "key_scale": arguments["key_scale"] / of_query,
            "value_scale": arguments["value_scale"] * factor,
        }
        got, got_lse = attend(ops, other, **options)
        assert_same_bits(got_lse, lse)
        # The smallest float16 results are then subnormal numbers with fewer bits.
        small = torch.finfo(dtype).tiny * 2 ** max(-power, 0)
        exact = out.abs() >= small
        assert exact.any() and torch.equal(got[exact], (out * factor)[exact])


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_a_query_vector_that_is_not_finite(ops, special, dtype, stored):
    problem, options = case("mixture", dtype, stored)
    expected = attend(ops, problem.arguments, **options)
    query = twin(problem.arguments["query"])
    query[5, 2, 7] = special
    for got, want in zip(
        attend(ops, problem.arguments | {"query": query}, **options), expected, strict=True
    ):
        assert got[5, 2].isnan().all()
        got[5, 2] = want[5, 2]
        assert_same_bits(got, want)


# 2. The same bits however a row is cut.


@pytest.mark.full(where=on_emulated_tiles(lambda case: case["dim"] in (16, 128)))
@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, dim, options", [
    ((4, 2), 64, {}), ((9, 3), 64, {"window": 37}), ((8, 2), 128, {"softcap": 5.0}),
    ((8, 1), 80, {}), ((40, 1), 16, {}),
])  # fmt: skip
def test_cuts(ops, heads, dim, options, dtype, stored):
    tokens, length = 70, 700
    (row,) = random_rows(
        [tokens], [length], num_heads=heads[0], num_kv_heads=heads[1], head_dim=dim, dtype=dtype
    )
    options = {**options, "return_lse": True}
    whole = eight_bit_problem(attention_problem([row]), stored).arguments
    expected = attend(ops, whole, **options)
    assert not any(x.isnan().any() for x in expected)
    for seed, longest in enumerate((1, 2, 9, 40)):
        generator, cut = random.Random(seed), []
        while sum(cut) < tokens:
            cut.append(min(generator.randint(1, longest), tokens - sum(cut)))
        chunks, first = [], 0
        for count in cut:
            end = length - tokens + first + count
            chunks.append(Row(row.query[first : first + count], row.key[:end], row.value[:end]))
            first += count
        order = list(range(len(cut)))
        generator.shuffle(order)
        dense = attention_problem([chunks[i] for i in order], seed=seed)
        problem = eight_bit_problem(dense, stored)
        with cpu_threads(1 + seed % 2):
            actual = attend(ops, problem.arguments, **options)
        for got, want, what in zip(actual, expected, ("out", "lse"), strict=True):
            parts = dict(zip(order, dense.split(got), strict=True))
            together = torch.cat([parts[i] for i in range(len(cut))])
            assert_same_bits(together, want, f"{what} cut into {cut}")


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode", "mixture", "head_dim 80", "everything"])
def test_pages(ops, name, dtype, stored):
    problem, options = case(name, dtype, stored)
    expected = attend(ops, problem.arguments, **options)
    for page in (1, 7, 16, 128):
        actual = attend(ops, pages_of(problem, page), **options)
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want, f"pages of {page}")


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_slot(ops, dtype, stored):
    """Segments that rows have in the same place are read once, with the bits of each row."""
    dense = random_attention_problem([3], [1400], dtype=dtype)
    one = eight_bit_problem(dense, stored).arguments
    generator = torch.Generator().manual_seed(1)
    lengths = [1400, 1399, 1030, 600, 513]
    query = torch.randn(len(lengths), 4, 64, generator=generator).to(dtype)
    several = one | {
        "query": query, "cu_seqlens_q": None, "lengths": int32(lengths),
        "slots": one["slots"].repeat(len(lengths)), "starts": one["starts"].repeat(len(lengths)),
    }  # fmt: skip
    together = attend(ops, several)
    for i, length in enumerate(lengths):
        alone = one | {"query": query[i : i + 1], "cu_seqlens_q": None, "lengths": int32([length])}
        assert_same_bits(together[i : i + 1], attend(ops, alone))


# 3. What is hidden never affects a token, for any elements and any scale.


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 5, 80])
def test_hidden_columns(ops, tokens, dtype, stored):
    dense = random_attention_problem([tokens], [300], dtype=dtype, num_slots=2)
    problem = eight_bit_problem(dense, stored)
    window = 30
    expected = attend(ops, problem.arguments, window=window, return_lse=True)
    slot, start = int(dense.slots[0]), int(dense.starts[0])
    # Before what the first token sees; and the last key, which only the last token sees.
    for hidden in (
        slice(start, start + 300 - tokens - window + 1),
        slice(start + 299, start + 300),
    ):
        spoiled = dict(problem.arguments)
        for name in ("key", "value"):
            cache, scale = (twin(spoiled[f"{name}_{x}"]) for x in ("cache", "scale"))
            scale[slot, :, hidden] = float("nan")
            if stored != torch.int8:
                cache.view(torch.int8)[slot, :, hidden] = 0x7F
            spoiled[f"{name}_cache"], spoiled[f"{name}_scale"] = cache, scale
        seen = tokens - 1 if hidden.stop == start + 300 else tokens
        actual = attend(ops, spoiled, window=window, return_lse=True)
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got[:seen], want[:seen])
            assert got[seen:].isnan().all()


@pytest.mark.parametrize("stored", EIGHT_BITS)
def test_nothing_past_the_end_is_read(ops, stored):
    """Caches and scales that end where the last row does, just before an unreadable page."""
    for dtype in DTYPES:
        dense = random_attention_problem(
            [1, 20], [70, 133], slots=[0, 1], starts=[63, 0], num_slots=2, capacity=133, dtype=dtype
        )
        problem = eight_bit_problem(dense, stored, (0, 0, 0, 0))
        expected = attend(ops, problem.arguments)
        ended = dict(problem.arguments)
        for name in ("key_cache", "value_cache", "key_scale", "value_scale"):
            x = ended[name]
            bits = x.view(torch.int8) if x.dtype == torch.float8_e4m3fn else x
            ended[name] = before_a_hole(bits.contiguous()).view(x.dtype)
        assert_same_bits(attend(ops, ended), expected)


def test_scales_of_any_strides(ops):
    """Scales `[slots, columns, heads]`, as in a pool of tokens."""
    problem, options = case("mixture", torch.float32, torch.int8)
    arguments = dict(problem.arguments)
    expected = attend(ops, arguments, **options)
    for name in ("key_scale", "value_scale"):
        arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
    for got, want in zip(attend(ops, arguments, **options), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out(ops, dtype, stored):
    problem, options = case("mixture", dtype, stored)
    expected = attend(ops, problem.arguments, **options)
    out = tuple(x.clone().fill_(float("nan")) for x in expected)
    assert ops.ragged_attention(**problem.arguments, **options, out=out) is out
    for got, want in zip(out, expected, strict=True):
        assert_same_bits(got, want)


# 4. Bad arguments.


def arguments_to_spoil():
    dense = random_attention_problem([2, 1], [3, 5], head_dim=16, slots=[1, 3], starts=[0, 2])
    return eight_bit_problem(dense, torch.int8).arguments


SCALES = ("key_scale", "value_scale")
CACHES = ("key_cache", "value_cache")
BAD = {
    "no scales": Refusal(
        "key_scale and value_scale", TypeError, **dict.fromkeys(SCALES, lambda x: None)
    ),
    "one scale": Refusal("key_scale and value_scale", ValueError, value_scale=lambda x: None),
    "the other scale": Refusal("key_scale and value_scale", ValueError, key_scale=lambda x: None),
    "scales of floats": Refusal(
        "key_cache", TypeError, **dict.fromkeys(CACHES, torch.Tensor.float)
    ),
    "scales float16": Refusal("key_scale", TypeError, key_scale=torch.Tensor.half),
    "scales float64": Refusal("value_scale", TypeError, value_scale=torch.Tensor.double),
    "scales of other columns": Refusal("key_scale", ValueError, key_scale=lambda x: x[:, :, 1:]),
    "scales with elements": Refusal("key_scale", ValueError, key_scale=lambda x: x[..., None]),
    "scales elsewhere": Refusal("value_scale", ValueError, value_scale=lambda x: x.to("meta")),
    "two kinds of caches": Refusal(
        "value_cache", TypeError, value_cache=lambda x: x.view(torch.float8_e4m3fn)
    ),
    "caches uint8": Refusal(
        "key_cache", TypeError, **dict.fromkeys(CACHES, lambda x: x.view(torch.uint8))
    ),
    "query of eight bits": Refusal("query", TypeError, query=lambda x: x.to(torch.int8)),
    "query float64": Refusal("query", TypeError, query=torch.Tensor.double),
}


@pytest.mark.parametrize("route", ["python", "fake", "torch.ops"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case, route):
    BAD[case].check("ragged_attention", arguments_to_spoil(), route)


# 5. torch.


def test_opcheck():
    arguments = arguments_to_spoil()
    torch.library.opcheck(torch.ops.baton_kernels.ragged_attention.options, (), arguments)
    torch.library.opcheck(torch.ops.baton_kernels.ragged_attention.lse, (), arguments)


def test_compiles():
    arguments = arguments_to_spoil()
    compiled = torch.compile(baton_kernels.ragged_attention, fullgraph=True)
    assert_same_bits(compiled(**arguments), baton_kernels.ragged_attention(**arguments))


# 6. By hand.


def test_by_hand(ops):
    """Two keys with equal scores: the mean of 2 * 0.5 and -4 * 0.25."""
    cache = torch.zeros(1, 1, 2, 16, dtype=torch.int8)
    cache[0, 0, :, 0] = torch.tensor([2, -4], dtype=torch.int8)
    zero, scale = torch.zeros(1, 1, 2), torch.tensor([[[0.5, 0.25]]])
    out = ops.ragged_attention(
        torch.ones(1, 1, 16), cache, cache, lengths=int32([2]), key_scale=zero, value_scale=scale
    )
    assert out[0, 0].tolist() == [0.0] * 16
    out = ops.ragged_attention(
        torch.ones(1, 1, 16), cache, cache, lengths=int32([1]), key_scale=zero, value_scale=scale
    )
    assert out[0, 0].tolist() == [1.0] + [0.0] * 15
    assert dequantize(cache[0, 0], scale[0, 0], torch.float32)[:, 0].tolist() == [1.0, -1.0]
