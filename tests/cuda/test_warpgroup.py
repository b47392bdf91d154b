"""ragged_attention's warpgroup kernel, for compute capability 9.0: emulated, as PTX, compiled.

| property | test |
| --- | --- |
| results, with copies and products early and late, judged | results |
| a token's bits: whole = cut = packed = split, for anything hidden | bits |
| every barrier, fence and wait is needed | mistake |
| nvcc's PTX gives the same, and the machine sees what is wrong in it | ptx |
| what it takes: registers, products, wavefronts, issue slots | counted |
"""

import functools
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from watched_ops import WatchedOps

from baton_kernels.testing import (
    Row,
    assert_accurate,
    assert_same_bits,
    attention_problem,
    random_rows,
)
from emulation import build
from emulation.cuda import mutants
from emulation.cuda.ops import BACKWARD, SHUFFLED, EmulatedOps
from emulation.ptx.counts import count_prefill
from emulation.ptx.ops import PtxOps, ptx_of
from emulation.ptx.warpgroup import WarpgroupMachine
from emulation.static.kernels import WARPGROUP, compile_kernels, compiled, dynamic_shared

EARLY = WatchedOps(build.FAST, prefill="wgmma")
JUDGED = WatchedOps(
    build.JUDGED, threads=SHUFFLED, warps=BACKWARD, blocks=SHUFFLED, late_copies=True,
    prefill="wgmma",
)  # fmt: skip
LATE = WatchedOps(build.FAST, warps=SHUFFLED, late_copies=True, seed=3, prefill="wgmma")

SLOPES = 2.0 ** -torch.arange(1.0, 5.0)
EVERYTHING = {"window": 100, "softcap": 5.0, "alibi_slopes": SLOPES, "sinks": torch.arange(4.0)}
# Query tokens and length by row, (num_heads, num_kv_heads), options.
CASES = {
    "prompt": ([150], [150], (4, 2), {"return_lse": True}),
    "rows of all kinds": ([2, 40, 1, 3], [2, 300, 90, 131], (4, 1), {"return_lse": True}),
    "two segments": ([24], [700], (4, 2), {}),
    "window": ([70], [400], (2, 1), {"window": 150}),
    "small window": ([200], [200], (2, 2), {"window": 3}),
    "both ways": ([40], [290], (4, 2), {"causal": False}),
    "everything": ([30, 30], [30, 260], (4, 4), EVERYTHING),
}


def rows_of(name, dtype):
    query_lengths, lengths, (heads, kv_heads), _ = CASES[name]
    return random_rows(
        query_lengths, lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=128, dtype=dtype
    )


@functools.cache
def expected(name, dtype):
    """Results of the emulator when copies arrive at once; they are checked to be accurate."""
    problem, options = attention_problem(rows_of(name, dtype)), CASES[name][3]
    with EARLY.entered():
        result = EARLY.ragged_attention(*problem.args, **options)
    assert "warpgroup" in EARLY.launched
    assert "prefill" not in EARLY.launched
    assert_accurate(result, "ragged_attention", *problem.args, **options)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_results_are_accurate(name, dtype):
    expected(name, dtype)


@pytest.mark.parametrize("schedule", [LATE, JUDGED], ids=["late", "judged"])
@pytest.mark.parametrize("name", ["rows of all kinds", "two segments", "window"])
def test_results_do_not_depend_on_the_schedule(name, schedule):
    problem, options = attention_problem(rows_of(name, torch.bfloat16)), CASES[name][3]
    with schedule.entered():
        result = schedule.ragged_attention(*problem.args, **options)
    for got, want in zip(
        result if isinstance(result, tuple) else (result,), expected(name, torch.bfloat16),
        strict=True,
    ):  # fmt: skip
        assert_same_bits(got, want)


# Bits.


def cut_of(row, counts):
    """The row as it was when each chunk was its last."""
    rows, first, before = [], 0, len(row.key) - len(row.query)
    for count in counts:
        end = first + count
        rows.append(Row(row.query[first:end], row.key[: before + end], row.value[: before + end]))
        first = end
    return rows


# Tokens, length, chunks of at least two tokens, options: tiles of vectors, tiles of keys and
# segments end within them.
CUTS = {
    "prompt": (150, 150, (2, 61, 3, 84), {}),
    "two segments": (60, 540, (33, 2, 25), {}),
    "window": (90, 400, (41, 49), {"window": 37}),
    "everything": (70, 560, (5, 65), EVERYTHING),
}


@pytest.mark.parametrize("name", CUTS)
def test_bits_are_those_of_the_position(name):
    """Whole, cut into chunks, and with all chunks packed with other rows in one call."""
    tokens, length, cut, options = CUTS[name]
    (row,) = random_rows(
        [tokens], [length], num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16
    )
    chunks, options = cut_of(row, cut), {**options, "return_lse": True}
    others = random_rows(
        [7, 1], [40, 9], num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16, seed=5
    )
    with EARLY.entered():
        whole = EARLY.ragged_attention(*attention_problem([row]).args, **options)
        apart = [
            EARLY.ragged_attention(*attention_problem([x]).args, **options) for x in chunks
        ]  # fmt: skip
        problem = attention_problem([others[0], *chunks, others[1]], seed=2)
        packed = [problem.split(x) for x in EARLY.ragged_attention(*problem.args, **options)]
    for i, want in enumerate(whole):
        assert_same_bits(torch.cat([results[i] for results in apart]), want)
        assert_same_bits(torch.cat(packed[i][1:-1]), want)


def test_segments_have_the_same_bits_in_one_block_and_in_blocks_of_their_own():
    (row,) = random_rows(
        [36], [1100], num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.float16
    )
    problem = attention_problem([row])
    # Enough vectors for the host to leave rows whole; none of them is a row's.
    idle = problem.query.new_zeros(128 * 64 // 4, 4, 128)
    more = [torch.cat([x, x.new_tensor([last])]) for x, last in (
        (problem.cu_seqlens_q, 36 + len(idle)), (problem.slots, -1), (problem.starts, 0),
        (problem.lengths, 1),
    )]  # fmt: skip
    with EARLY.entered():
        split = EARLY.ragged_attention(*problem.args, return_lse=True)
        assert "merge" in EARLY.launched
        streamed = EARLY.ragged_attention(
            torch.cat([problem.query, idle]), problem.key_cache, problem.value_cache, *more,
            return_lse=True,
        )  # fmt: skip
    for got, want in zip(streamed, split, strict=True):
        assert_same_bits(got[:36], want)


# Tokens, length, options, the poisoned key.
HIDDEN = {
    "prompt": (140, 140, {}, 131),
    "second segment": (20, 540, {}, 530),
    "window": (60, 200, {"window": 20}, 150),
}


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_values_reach_nobody_who_does_not_see_them(name, poison):
    tokens, length, options, key = HIDDEN[name]
    (row,) = random_rows(
        [tokens], [length], num_heads=2, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16
    )
    with EARLY.entered():
        clean = EARLY.ragged_attention(*attention_problem([row]).args, **options)
        row.value[key, 0, 70] = row.key[key, 0, 3] = poison
        row.key[key, 0, 3] = 0.5
        spoilt = EARLY.ragged_attention(*attention_problem([row]).args, **options)
    position = torch.arange(length - tokens, length)
    sees = (position >= key) & (position - options.get("window", length) < key)
    assert sees.any() and not sees.all()
    assert_same_bits(spoilt[~sees], clean[~sees])
    of_poison = spoilt[sees][:, :, 70]
    assert (of_poison.isnan() if math.isnan(poison) else of_poison == poison).all()


# Calls that the kernel serves.


@pytest.mark.parametrize(
    "other", [{"head_dim": 64}, {"dtype": torch.float32}, {"num_heads": 17, "num_kv_heads": 1}]
)
def test_other_calls_go_where_they_went(other):
    """A group of 17 heads has no decode kernel, whose splits begin within tiles."""
    rows = random_rows([9], [40], **{"head_dim": 128, "dtype": torch.float16, **other})
    problem = attention_problem(rows)
    usual = EmulatedOps(build.FAST)
    with EARLY.entered():
        got = EARLY.ragged_attention(*problem.args)
    with usual.entered():
        assert_same_bits(got, usual.ragged_attention(*problem.args))
    assert "warpgroup" not in EARLY.launched


# Every barrier, fence and wait left out, and some indices spoilt: what the judge says.

RACE = r"race: |read of unwritten shared memory: "
STUCK = "is stuck: .* in (mbarrier.try_wait|wgmma.wait_group)"
MISTAKES = {
    "fence_products": "missing proxy fence",
    "fence_registers": "missing wgmma.fence before a product",
    "copy_async_wait<0>": "missing wait for cp.async",
    "copy_async_wait<kCopiesAhead>": "missing wait for cp.async",
    # Or the ring goes on beneath a product.
    "wait_for_products<0>": "sums of a product in flight were overwritten|missing wait for cp",
    "wait_for_products<1>": "sums of a product in flight were overwritten",
    "commit_products": "sums of a product in flight|while products are in flight",
    "arrive_as_warp": STUCK,
    "wait_for_phase": RACE,
    "__syncwarp": RACE,
    "__syncthreads": RACE,
    "every round waits for the first one's phase": f"{RACE}|{STUCK}",
    "places are waited for as if they were not empty at first": STUCK,
    "a descriptor's eights of rows lie too far apart": f"{RACE}|missing wait|outside of shared",
}
MUTANTS = [mutant for mutant in mutants.all_mutants() if mutant.kernels == "warpgroup"]


@functools.cache
def mutant_program() -> Path:
    return mutants.program(build.JUDGED)


def run_mutant(number: int) -> str:
    done = subprocess.run(
        [mutant_program(), str(number), "warpgroup"], capture_output=True, text=True, timeout=900
    )
    assert (done.returncode != 0) == bool(done.stdout + done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_mistake_is_caught(mutant):
    output = run_mutant(mutant.number)
    assert re.search(MISTAKES[mutant.what], output), output


def test_without_a_mistake_there_is_no_report():
    assert run_mutant(0) == ""


# nvcc's PTX, executed.


# The decode kernel next to it is not compiled for float16 otherwise.
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("name", ["rows of all kinds", "window"])
def test_ptx_gives_what_the_emulator_gives(name, dtype):
    ops, options = PtxOps(prefill="wgmma"), CASES[name][3]
    problem = attention_problem(rows_of(name, dtype))
    with ops.entered():
        result = ops.ragged_attention(*problem.args, **options)
    assert_accurate(result, "ragged_attention", *problem.args, **options)
    products = {kernel: machine.instructions("wgmma.mma") for kernel, machine in ops.machines}
    assert sum(products.values()) > 0
    for kernel, machine in ops.machines:
        assert machine.memory.shared_bytes == (
            dynamic_shared("warpgroup_kernel<T>") if "warpgroup" in kernel
            else machine.memory.shared_bytes
        )  # fmt: skip


# Parts of that PTX, and the same parts with a mistake that the emulator's twins cannot show.
# Descriptors: the swizzle, eights of rows in 1024 bytes, and panels of values in 16 KB.
KEYS, VALUES = 1 << 62 | 64 << 32, 1 << 62 | 64 << 32 | 1024 << 16
DEFECTS = {
    "no proxy fence": (r"fence\.proxy\.async[^;]*;", ""),
    "no fence of registers": (r"wgmma\.fence[^;]*;", ""),
    "no wait for products": (r"wgmma\.wait_group[^;]*;", ""),
    "no group": (r"wgmma\.commit_group[^;]*;", ""),
    "no wait for copies": (r"cp\.async\.wait_group[^;]*;", ""),
    "the first phase for all": (r"(ended, \[[^]]*\]), %r\d+;", r"\1, 0;"),
    "nobody arrives": (r"mbarrier\.arrive[^;]*;", ""),
    "offsets of a descriptor swapped": (rf"\b{VALUES}\b", str(1 << 62 | 1024 << 32 | 64 << 16)),
    "no swizzle": (rf"\b{KEYS}\b", str(64 << 32)),
    "values taken for columns": (r"adds, 1, 1, 1;", "adds, 1, 1, 0;"),
    "first operand's registers swapped": (
        r"\{(%r\d+), (%r\d+), (%r\d+), (%r\d+)\}, (%rd\d+), adds", r"{\1, \3, \2, \4}, \5, adds",
    ),
}  # fmt: skip


class PlantedOps(PtxOps):
    """Runs the warpgroup kernel's PTX with a pattern replaced."""

    def __init__(self, pattern: str, replacement: str) -> None:
        super().__init__(prefill="wgmma")
        self.pattern, self.replacement = pattern, replacement

    def machine(self, op, kernel):
        if "warpgroup" not in kernel:
            return super().machine(op, kernel)
        text, count = re.subn(self.pattern, self.replacement, ptx_of(op, kernel, 80, self.sources))
        assert count > 0
        return WarpgroupMachine(text, kernel)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_in_ptx_is_caught(defect):
    rows = random_rows([24], [300], num_heads=4, num_kv_heads=1, head_dim=128, dtype=torch.bfloat16)
    problem, ops = attention_problem(rows), PlantedOps(*DEFECTS[defect])
    with ops.entered(), pytest.raises((AssertionError, RuntimeError, IndexError)) as caught:
        result = ops.ragged_attention(*problem.args)
        assert_accurate(result, "ragged_attention", *problem.args)
    assert "assert count" not in str(caught.value)


# Counted.


def test_compiled_without_spills_and_products_run_on_their_own():
    kernels = compile_kernels(WARPGROUP)
    assert len(kernels) == 2
    for kernel in kernels:
        assert kernel.spills == 0 and kernel.stack == 0 and kernel.count("LDL|STL") == 0
        assert kernel.count("HGMMA") >= 32 and kernel.count(r"LDGSTS.*128") >= 16
        assert kernel.blocks_per_sm(384, dynamic_shared(kernel.name)) == 1
        # Warpgroups share what the block is launched with. Were that too little for all, the last
        # one would wait for it for ever.
        registers = {
            line.opcode.split(".")[1]: int(line.operands.split()[-1], 16)
            for line in kernel.lines if line.opcode.startswith("USETMAXREG")
        }  # fmt: skip
        taken = 256 * registers["TRY_ALLOC"] + 128 * registers["DEALLOC"]
        assert taken <= 384 * kernel.registers
        # Eight warps of consumers share four schedulers; a tile is 2,048 cycles of products.
        assert 8 * kernel.shortest_turn() / 4 <= 1200
    # ptxas would say so of products that it makes wait for one another.
    assert "serialized" not in compiled(WARPGROUP, (90,)).report
    assert "setmaxnreg" not in compiled(WARPGROUP, (90,)).report


def test_counts_leave_room_for_600_tflops():
    """Issue slots and wavefronts of shared memory, compared with the default kernel's."""
    ours, default = count_prefill("wgmma"), count_prefill("mma")
    # All threads of a warp read items, states, and the marks of values that are not finite.
    assert ours.wavefronts <= 1.02 * ours.ideal_wavefronts
    assert ours.wavefronts_per_product <= 0.82 and default.wavefronts_per_product >= 2.4
    assert ours.instructions / 4 <= 1880
    assert ours.tflops("H100") >= 600 and default.tflops("H100") < 600
