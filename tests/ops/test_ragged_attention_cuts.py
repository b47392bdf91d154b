"""A token's bits depend on its position, not on the call that computes it: rows are cut into chunks
of any size, down to decoding every token, and packed in any order.

On the CPU a chunk of one token is like any other. On a GPU it has the bits of decoding, whose
products have other shapes.
"""

import functools
import random

import pytest
import torch
from equality_run import chunks_of
from judged import on_emulated_tiles

from baton_kernels.testing import (
    DTYPES,
    Row,
    assert_same_bits,
    attention_problem,
    cpu_threads,
    random_rows,
)

# cuda-judged has the bits of cuda-emulated (tests/cuda/test_emulation.py). In Triton the order of
# sums depends on the chunk.
NOT_ON = ("cuda-judged", "triton", "triton-cuda")


@pytest.fixture(autouse=True)
def decodes_as_it_prefills(request):
    """Whether a chunk of one token has the bits of larger ones."""
    return request.node.callspec.params["ops"].name.startswith("cpu-")


def random_cut(tokens: int, longest: int, seed: int) -> list[int]:
    """Lengths of chunks, at most `longest` each."""
    generator, chunks = random.Random(seed), []
    while sum(chunks) < tokens:
        chunks.append(min(generator.randint(1, longest), tokens - sum(chunks)))
    return chunks


EVERYTHING = {"window": 100, "softcap": 5.0, "alibi": True, "sinks": True}
# Tokens, length, (num_heads, num_kv_heads), head_dim, options ("alibi", "sinks": flags).
CASES = {
    # Blocks of keys, segments of 512, and tiles of query vectors all end within these tokens.
    "segments": (150, 1100, (4, 2), 64, {}),
    "from the start": (200, 200, (4, 4), 64, {}),
    "thirds": (150, 600, (9, 3), 64, {}),
    "head_dim 128": (100, 560, (8, 2), 128, {}),
    "head_dim 80": (70, 530, (8, 1), 80, {}),
    "head_dim 24": (70, 530, (2, 2), 24, {}),
    "head_dim 256": (40, 530, (4, 1), 256, {"scale": 0.02}),
    "large group": (20, 530, (40, 1), 16, {}),
    # Probabilities are rescaled, and some are rounded to 0.
    "large scores": (100, 600, (4, 2), 64, {"scale": 3.0}),
    "window": (150, 700, (4, 2), 64, {"window": 37}),
    "small window": (90, 560, (9, 3), 64, {"window": 3}),
    "everything": (90, 700, (4, 2), 64, EVERYTHING),
}


@functools.cache
def row_of(name: str, dtype: torch.dtype) -> Row:
    tokens, length, (num_heads, num_kv_heads), head_dim, _ = CASES[name]
    (row,) = random_rows(
        [tokens], [length], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    return row


def options_of(name: str) -> dict:
    num_heads, options = CASES[name][2][0], dict(CASES[name][4])
    if options.pop("alibi", False):
        options["alibi_slopes"] = 2.0 ** -torch.arange(1.0, num_heads + 1)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 3.0, num_heads)
    return {**options, "return_lse": True}


def expected_of(ops, row, cut, decodes_as_it_prefills, **options):
    """The result for every token of a row, computed whole or decoded, as chunks of these sizes
    are."""
    whole = ops.ragged_attention(*attention_problem([row]).args, **options)
    assert not any(x.isnan().any() for x in whole)
    if decodes_as_it_prefills:
        return whole
    alone = torch.tensor([count == 1 for count in cut]).repeat_interleave(torch.tensor(cut))
    if alone.any():
        each = zip(chunks_of(row, [1] * len(row.query)), alone, strict=True)
        decoding = attention_problem([chunk for chunk, is_alone in each if is_alone])
        decoded = ops.ragged_attention(*decoding.args, **options)
        for x, of_rows in zip(whole, decoded, strict=True):
            x[alone] = torch.cat(decoding.split(of_rows))
    return whole


# All dtypes of the other cases run on the generic kernel, whose sums are those of float32.
FLOAT32_ON_THE_EMULATOR = ("segments", "head_dim 24", "everything")


# On emulated tiles: their sizes and masks are those of the others.
NOT_ON_EMULATED_TILES = ("from the start", "thirds", "head_dim 256", "large scores")


def others_stand_for_it(case):
    """On the emulator float16 is bfloat16 with another type of number."""
    if case["ops"].name != "cuda-emulated":
        return on_emulated_tiles(lambda case: case["name"] in NOT_ON_EMULATED_TILES)(case)
    if case["dtype"] is torch.float32:
        return case["name"] not in FLOAT32_ON_THE_EMULATOR
    return case["dtype"] is torch.float16 and list(CASES).index(case["name"]) % 3 > 0


@pytest.mark.full(where=others_stand_for_it)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_cuts(ops, name, dtype, decodes_as_it_prefills, request):
    row, options = row_of(name, dtype), options_of(name)
    # Emulation is slow, and on a GPU a chunk of one token is a separate kind.
    emulated = "emulated" in request.node.callspec.params["ops"].name
    longest_chunks = (2, 40) if emulated else (2, 9, 40, 90)
    cuts = [random_cut(len(row.query), longest, seed=longest) for longest in longest_chunks]
    if decodes_as_it_prefills:
        cuts.append([1] * len(row.query))
    for seed, cut in enumerate(cuts):
        # In one call, each chunk as a separate row, in any order, some in two threads.
        chunks = list(enumerate(chunks_of(row, cut)))
        random.Random(seed).shuffle(chunks)
        packed = attention_problem([chunk for _, chunk in chunks], seed=seed)
        expected = expected_of(ops, row, cut, decodes_as_it_prefills, **options)
        with cpu_threads(1 + seed % 2):
            actual = ops.ragged_attention(*packed.args, **options)
        for got, want, what in zip(actual, expected, ("out", "lse"), strict=True):
            parts = {i: x for (i, _), x in zip(chunks, packed.split(got), strict=True)}
            together = torch.cat([parts[i] for i in range(len(cut))])
            assert_same_bits(together, want, f"{what} cut into {cut}")


def longest_on_an_emulator(case):
    """Segments end at the same places for every dtype and instruction set, so of the emulators
    only CUDA's runs the third kind of them, in bfloat16, and the second not in float32."""
    name, dtype = case["ops"].name, case["dtype"]
    if case["end"] == 82000:
        return "emulated" in name and (name, dtype) != ("cuda-emulated", torch.bfloat16)
    return name == "cuda-emulated" and dtype is torch.float32


@pytest.mark.full(where=longest_on_an_emulator)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [16400, 82000])
def test_cuts_of_a_long_row(ops, end, dtype, decodes_as_it_prefills):
    """Segments grow along a row: from 512 to 2048 keys, then to 8192."""
    (row,) = random_rows([24], [end], num_heads=2, num_kv_heads=1, head_dim=16, dtype=dtype)
    for cut in ([1, 2, 20, 1], [23, 1]):
        expected = expected_of(ops, row, cut, decodes_as_it_prefills, return_lse=True)
        problem = attention_problem(chunks_of(row, cut))
        actual = ops.ragged_attention(*problem.args, return_lse=True)
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want, f"cut into {cut}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_and_one_tile_merge_alike(ops, dtype):
    """64 query vectors form a tile whose segments are items; with one more, tiles stream them."""
    (row,) = random_rows([65], [1300], num_heads=1, num_kv_heads=1, dtype=dtype)
    whole = attention_problem([row])
    expected = ops.ragged_attention(*whole.args)
    (last,) = chunks_of(Row(row.query[1:], row.key, row.value), [64])
    assert_same_bits(ops.ragged_attention(*attention_problem([last]).args), expected[1:])
