"""ragged_attention's prefill kernel with 32 query vectors per warp, for compute capability 8 and 9.

| property | test |
| --- | --- |
| its bits are those of the kernel with 16 per warp, for everything that may differ | bits |
| no schedule and no judge sees a difference | judged |
| the host takes it for calls that fill the device, and for no other head_dim | chosen |
| nvcc's PTX gives the same | ptx |
| keys and values cross shared memory half as often, and no register is spilled | counted |
"""

import math

import pytest
import torch
from paged import paged_problem
from watched_ops import WatchedOps, with_idle_row

from baton_kernels.testing import assert_accurate, assert_same_bits, attention_problem, random_rows
from emulation import build
from emulation.cuda.ops import BACKWARD, SHUFFLED
from emulation.ptx.counts import count_prefill
from emulation.ptx.ops import PtxOps
from emulation.static.kernels import ROOT, compile_kernels, dynamic_shared, has_two_tiles

ONE, TWO = WatchedOps(prefill="mma"), WatchedOps(prefill="mma32")
JUDGED = WatchedOps(
    build.JUDGED, threads=SHUFFLED, warps=BACKWARD, blocks=SHUFFLED, late_copies=True,
    prefill="mma32",
)  # fmt: skip
TILES = {ONE: "Li128ELi1E", TWO: "Li128ELi2E", JUDGED: "Li128ELi2E"}

SLOPES = 2.0 ** -torch.arange(1.0, 5.0)
EVERYTHING = {"window": 100, "softcap": 5.0, "alibi_slopes": SLOPES, "sinks": torch.arange(4.0)}
# Query tokens and length by row, (num_heads, num_kv_heads), options.
CASES = {
    "prompt": ([150], [150], (4, 2), {}),
    "rows of all kinds": ([2, 40, 1, 3], [2, 300, 90, 131], (4, 1), {}),
    "split": ([24], [700], (4, 2), {}),
    "no decode kernel": ([9, 1], [60, 700], (20, 1), {}),
    "window": ([70], [400], (2, 1), {"window": 150}),
    "small window": ([200], [200], (2, 2), {"window": 3}),
    "both ways": ([40], [290], (4, 2), {"causal": False}),
    "everything": ([30, 30], [30, 260], (4, 4), EVERYTHING),
    "tokens that see nothing": ([60], [12], (4, 2), {}),
}


def problem_of(name, dtype):
    query_lengths, lengths, (heads, kv_heads), _ = CASES[name]
    rows = random_rows(
        query_lengths, lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=128, dtype=dtype
    )
    return attention_problem(rows)


def run(ops, problem, options):
    with ops.entered():
        result = ops.ragged_attention(**vars(problem), return_lse=True, **options)
    prefill = [name for name in ops.kernels if "prefill_kernel" in name]
    assert prefill and all(TILES[ops] in name for name in prefill)
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_bits_are_those_of_16_vectors_per_warp(name, dtype):
    problem, options = problem_of(name, dtype), CASES[name][3]
    want = run(ONE, problem, options)
    for x, y in zip(run(TWO, problem, options), want, strict=True):
        assert_same_bits(x, y)


def test_segments_have_the_same_bits_in_one_block_and_in_blocks_of_their_own():
    problem = problem_of("split", torch.float16)
    split = run(TWO, problem, {})
    assert TWO.partial_results(128) > 0
    with TWO.entered():
        streamed = TWO.ragged_attention(*with_idle_row(problem, 4), return_lse=True)
    for x, y in zip(streamed, split, strict=True):
        assert_same_bits(x[: len(y)], y)


@pytest.mark.parametrize("page", [16, 24])
def test_bits_do_not_depend_on_pages(page):
    problem, options = problem_of("rows of all kinds", torch.bfloat16), {}
    want = run(ONE, problem, options)
    paged = paged_problem(problem, page)
    for x, y in zip(run(TWO, paged, options), want, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("key", [3, 61, 131])
def test_hidden_values_reach_nobody_who_does_not_see_them(key, poison):
    (row,) = random_rows(
        [140], [140], num_heads=2, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16
    )
    clean, _ = run(TWO, attention_problem([row]), {})
    row.value[key, 0, 70] = poison
    problem = attention_problem([row])
    spoilt, _ = run(TWO, problem, {})
    assert_same_bits(spoilt, run(ONE, problem, {})[0])
    assert_same_bits(spoilt[:key], clean[:key])
    of_poison = spoilt[key:, :, 70]
    assert (of_poison.isnan() if math.isnan(poison) else of_poison == poison).all()


@pytest.mark.parametrize("name", ["rows of all kinds", "split", "window"])
def test_the_judge_has_no_complaint(name):
    problem, options = problem_of(name, torch.bfloat16), CASES[name][3]
    want = run(TWO, problem, options)
    for x, y in zip(run(JUDGED, problem, options), want, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize(
    ("tokens", "head_dim", "tiles"), [(300, 128, 2), (40, 128, 1), (300, 64, 1), (300, 96, 1)]
)
def test_the_host_chooses_by_dims_and_by_what_fills_the_device(tokens, head_dim, tiles):
    """The emulated one has the shared memory of compute capability 8.0, and two multiprocessors."""
    rows = random_rows(
        [tokens], [tokens], num_heads=4, num_kv_heads=2, head_dim=head_dim, dtype=torch.bfloat16
    )
    problem, ops = attention_problem(rows), WatchedOps()
    with ops.entered():
        ops.ragged_attention(*problem.args)
    (kernel,) = (name for name in ops.kernels if "prefill_kernel" in name)
    assert f"Li{head_dim}ELi{tiles}E" in kernel


@pytest.mark.parametrize("page", [None, pytest.param(16, marks=pytest.mark.full)])
def test_ptx_gives_what_the_emulator_gives(page):
    problem, ops = problem_of("rows of all kinds", torch.bfloat16), PtxOps(prefill="mma32")
    call = problem if page is None else paged_problem(problem, page)
    with ops.entered():
        result = ops.ragged_attention(**vars(call), return_lse=True)
    assert_accurate(result, "ragged_attention", *problem.args, return_lse=True)
    (machine,) = (machine for name, machine in ops.machines if "Li128ELi2E" in name)
    assert machine.instructions("mma") > 0


def test_counts():
    """Shared wavefronts per m16n8k16 with two tiles per warp: 1 instead of 2 for keys or values, a
    quarter instead of a half to write the tile, and for every second one 1 for queries."""
    one, two = count_prefill("mma"), count_prefill("mma32")
    assert one.wavefronts_per_product == pytest.approx(2.5, abs=0.01)
    assert two.wavefronts_per_product < 1.8 and two.wavefronts < 1.01 * two.ideal_wavefronts
    assert two.instructions < 0.82 * one.instructions
    # An A100 is bound by its tensor cores; with one tile, by shared memory.
    assert one.tflops("A100") < 260 and two.tflops("A100") == 312
    assert one.tflops("H100") < 400 and two.tflops("H100") > 520


def test_two_blocks_of_8_0_without_spills():
    source = ROOT / "csrc" / "cuda" / "ragged_attention" / "bfloat16.cu"
    (kernel,) = (k for k in compile_kernels(source, (80,)) if has_two_tiles(k.name))
    assert kernel.spills == kernel.stack == 0 and kernel.has_products()
    assert kernel.blocks_per_sm(128, dynamic_shared(kernel.name)) == 2
