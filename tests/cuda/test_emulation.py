"""The judges of the CUDA kernels: planted defects are caught, good kernels give no report."""

import functools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from baton_kernels import reference
from baton_kernels.testing import assert_same_bits, cumulative, int32
from emulation import build
from emulation.cuda import mutants
from emulation.cuda.backends import EMULATED
from emulation.cuda.ops import BACKWARD, FORWARD, SHUFFLED, EmulatedOps, EmulationError

# The report that each judge must make for each defect. The names are files of the folder.
JUDGED = {
    "global_out_of_bounds": "outside of every tensor: write of 4 bytes",
    "dynamic_shared_out_of_bounds": "outside of shared memory: write of 4 bytes",
    "missing_barrier": "race: read of 4 bytes",
    "missing_warp_sync": "race: read of 4 bytes",
    "missing_wait": "missing wait for cp.async: read of 4 bytes",
    "missing_grid_wait": "missing wait for the grid before: read of 4 bytes at x",
    "ends_before_grid": r"missing wait for the grid before: .* ends without",
    "missing_sync_before_ldmatrix": "race: read of 16 bytes",
    "missing_trailing_barrier": "race: write of 4 bytes",
    "divergent_barrier": "divergent barrier",
    "divergent_shuffle": "divergent barrier: .* in __shfl_xor_sync",
    "misaligned_vector": "misaligned load of 16 bytes",
    "block_race": "race: write of 4 bytes at x",
    "block_race_across_barrier": "race: read of 4 bytes at x",
    "missing_fence": "race: read of 4 bytes at partials",
    "unwritten_shared": "read of unwritten shared memory: read of 4 bytes",
}
ADDRESS = {
    "global_out_of_bounds": "heap-buffer-overflow",
    "dynamic_shared_out_of_bounds": "heap-buffer-overflow",
    "static_shared_out_of_bounds": "index 64 out of bounds",
    "missing_wait": "wrong result",
    "divergent_barrier": "divergent barrier",
    "divergent_shuffle": "divergent barrier",
    "ends_before_grid": "missing wait for the grid before",
    "misaligned_vector": "misaligned load of 16 bytes",
    "misaligned_dereference": "misaligned address",
}
THREAD = {
    name: "ThreadSanitizer: data race"
    for name in (
        "missing_barrier", "missing_warp_sync", "missing_sync_before_ldmatrix",
        "missing_trailing_barrier", "block_race", "block_race_across_barrier", "missing_fence",
    )
}  # fmt: skip
VARIANTS = {"judged": build.JUDGED, "address": build.ADDRESS, "thread": build.THREAD}
CASES = [("judged", n, t) for n, t in JUDGED.items()]
CASES += [("address", n, t) for n, t in ADDRESS.items()]
CASES += [("thread", n, t) for n, t in THREAD.items()]


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        timeout=900,  # for a program that hangs: a busy machine takes minutes
        env={"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"},
    )


@functools.cache
def program(variant: str, name: str) -> Path:
    if name == "defects":
        return build.build_program(name, [build.DEFECTS], VARIANTS[variant])
    if name == "mutants":
        return mutants.program(VARIANTS[variant])
    sources = [*build.KERNELS, build.DISPATCH, build.CUDA / "kernel_set.cu"]
    return build.build_program(name, sources, VARIANTS[variant])


def test_every_kind_of_defect_is_planted():
    planted = {path.stem for path in build.DEFECTS.parent.glob("*.cu")} - {"main"}
    assert planted == JUDGED.keys() | ADDRESS.keys() | THREAD.keys()


@pytest.mark.parametrize(("variant", "defect", "text"), CASES)
def test_defect_is_caught(variant, defect, text):
    wrong = run(program(variant, "defects"), defect, "1")
    output = wrong.stdout + wrong.stderr
    assert wrong.returncode != 0, output
    assert re.search(text, output), output


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("defect", sorted(JUDGED.keys() | ADDRESS.keys()))
def test_right_twin_of_a_defect_gives_no_report(variant, defect):
    right = run(program(variant, "defects"), defect, "0")
    assert right.returncode == 0 and right.stdout + right.stderr == ""


# The judge sees accesses outside of what is allocated, by more than a red zone, and the races that
# ThreadSanitizer sees: the tables above and below. ThreadSanitizer has the attention kernels below.
WHOLE = [pytest.param(v, marks=[] if v == "judged" else [pytest.mark.full]) for v in VARIANTS]


@pytest.mark.long
@pytest.mark.parametrize("variant", WHOLE)
def test_kernels_under_a_sanitizer(variant):
    done = run(program(variant, "kernels"))
    assert done.returncode == 0 and done.stdout + done.stderr == ""


# Every barrier and wait of the attention kernels, left out: the reports of the judge and of
# ThreadSanitizer. Both see the mistakes in the table below unless it says otherwise.
RACE = r"race: |read of unwritten shared memory: "
WAIT = "missing wait for cp.async: "
MUTANTS = {
    # Only program order: without them ptxas loads keys and values in another order.
    "decode_warp.h: __syncwarp #1": None,
    "decode_warp.h: __syncwarp #2": None,
    # The barrier at the beginning of the first tile comes before any of the queries is read.
    "prefill_tile.h: __syncwarp #1": None,
    # Also order for ptxas: every thread reads totals that it wrote itself.
    "prefill_vectors.h: __syncwarp #1": None,
    "prefill_vectors.h: __syncwarp #2": None,
    "prefill_vectors.h: __syncwarp #3": None,
    # Behind the prefill, which has no partial results here and started when decode had ended.
    "merge.h: wait_for_grid_before #1": r"missing wait for the grid before: .* ends without",
    # Copies have landed by the barrier that ThreadSanitizer relies on, whichever thread waited.
    "prefill.h: copy_async_wait<1> #1": WAIT,
    "prefill.h: copy_async_wait<0> #1": WAIT,
    "prefill_tile.h: all tiles share one stage #1": WAIT,
}


# Those of the warpgroup kernel are in test_warpgroup.py.
@pytest.mark.parametrize(
    "mutant", [mutant for mutant in mutants.all_mutants() if mutant.kernels != "warpgroup"], ids=str
)
def test_a_mistake_in_the_attention_kernels_is_caught(mutant):
    def report(variant):
        done = run(program(variant, "mutants"), str(mutant.number), mutant.kernels)
        assert (done.returncode != 0) == bool(done.stdout + done.stderr)
        return done.stdout + done.stderr

    expected = MUTANTS.get(str(mutant), RACE)
    judged = report("judged")
    assert re.search(expected, judged) if expected else not judged, judged
    if expected == RACE:
        assert "ThreadSanitizer: data race" in report("thread")


@pytest.mark.parametrize("kernels", ["generic", "tensor_core"])
@pytest.mark.parametrize("variant", [build.JUDGED_75, build.THREAD], ids=lambda v: v.name)
def test_attention_without_a_mistake_gives_no_report(variant, kernels):
    """Copies of sm_75 go through registers, and bfloat16 products through shuffles."""
    done = run(mutants.program(variant), "0", kernels)
    assert done.returncode == 0 and done.stdout + done.stderr == ""


def test_table_of_mutants_has_no_name_too_many():
    assert MUTANTS.keys() <= {str(mutant) for mutant in mutants.all_mutants()}


# The emulator itself.


def test_the_judge_has_a_module_of_its_own():
    """Otherwise the fast one would run under its name."""
    fast, judged = (ops.module for ops in EMULATED.values())
    assert fast.__name__ == "emulated_fast" and judged.__name__ == "emulated_judged"
    assert fast.insert_kv is not judged.insert_kv


@pytest.mark.parametrize("blocks", [FORWARD, BACKWARD, SHUFFLED])
@pytest.mark.parametrize("warps", [FORWARD, BACKWARD, SHUFFLED])
def test_results_do_not_depend_on_the_schedule(warps, blocks):
    """An overlapping move is the kernel whose order matters most."""
    ops = EmulatedOps(build.FAST, threads=SHUFFLED, warps=warps, blocks=blocks, seed=7)
    caches = [torch.randn(3, 2, 90, 64), torch.randn(3, 2, 90, 64)]
    expected = [x.clone() for x in caches]
    moves = [int32(x) for x in ([0, 1, 2], [0, 20, 5], [0, 1, 2], [3, 1, 40], [87, 70, 50])]
    with ops.entered():
        ops.move_kv(*caches, *moves)
    reference.move_kv(*expected, *moves)
    for x, y in zip(caches, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize("bad", [{"slots": [0, 9]}, {"slots": [0, -1]}, {"starts": [2, 6]},
                                 {"starts": [2, -1]}, {"starts": [2, 2**31 - 1]}])  # fmt: skip
def test_values_out_of_range_are_skipped(backend, bad):
    """The host cannot read the indices, and the device must not follow them; the other row is
    right."""
    ops = EMULATED[backend]
    key = torch.randn(6, 2, 16)
    indices = {"slots": [0, 1], "starts": [2, 1]} | bad
    caches = [torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 8, 16)]
    expected = [x.clone() for x in caches]
    with ops.entered():
        ops.insert_kv(
            key, key, *caches, cumulative([3, 3]), *(int32(x) for x in indices.values()),
            zero_padding=True,
        )  # fmt: skip
    reference.insert_kv(key[:3], key[:3], *expected, cumulative([3]), int32([0]), int32([2]))
    for x, y in zip(caches, expected, strict=True):
        assert_same_bits(x, y)


@pytest.mark.parametrize("bounds", [[0, 3, 2], [0, 3, 9], [1, 3, 6], [0, -4, 6], [5, 2, 1]])
def test_cu_seqlens_that_make_no_sense_stay_inside(bounds):
    """For any indices, the judge finds no access outside of the tensors."""
    ops = EMULATED["cuda-judged"]
    key, caches = torch.randn(6, 2, 16), [torch.zeros(3, 2, 8, 16), torch.zeros(3, 2, 8, 16)]
    slots, starts = int32([0, 1]), int32([0, 2])
    with ops.entered():
        ops.insert_kv(key, key, *caches, int32(bounds), slots, starts)
        ops.extract_kv(*caches, int32(bounds), slots, starts, total_tokens=6)


# Bounds of queries, and which queries are whole: no other is copied, not even in part.
WHOLE = [
    ([0, 3, 2], []), ([0, 4, 2, 6], []), ([0, 3, 9], [0]), ([-2, 3, 6], [1]), ([1, 3, 6], [0, 1]),
    ([4, 1], []), ([0, *range(0, 7), 5, 6], []), ([*[0] * 40, 4, 3, 6], []),
]  # fmt: skip


@pytest.mark.parametrize("backend", EMULATED)
@pytest.mark.parametrize(("bounds", "whole"), WHOLE)
def test_queries_are_copied_whole_or_not_at_all(backend, bounds, whole):
    ops, queries = EMULATED[backend], len(bounds) - 1
    key = torch.randn(6, 2, 16)
    caches = [torch.zeros(queries, 2, 8, 16) for _ in range(2)]
    slots, starts = int32(range(queries)), int32([1] * queries)
    expected = torch.zeros_like(caches[0])
    for i in whole:
        count = bounds[i + 1] - bounds[i]
        expected[i, :, 1 : 1 + count] = key[bounds[i] : bounds[i + 1]].transpose(0, 1)
    with ops.entered():
        ops.insert_kv(key, key, *caches, int32(bounds), slots, starts, zero_padding=True)
        full = torch.ones_like(expected)
        out, _ = ops.extract_kv(full, full, int32(bounds), slots, starts, total_tokens=6)
    for cache in caches:
        assert_same_bits(cache, expected)
    copied = torch.zeros(6, dtype=torch.bool)
    for i in whole:
        copied[bounds[i] : bounds[i + 1]] = True
    assert (out[copied] == 1).all() and out[~copied].isnan().all()


@pytest.mark.parametrize("name", ["append_kv", "move_kv"])
def test_other_ops_skip_values_out_of_range(name):
    caches = [torch.zeros(2, 1, 4, 16), torch.zeros(2, 1, 4, 16)]
    ops = EMULATED["cuda-judged"]
    with ops.entered():
        if name == "append_kv":
            key = torch.ones(4, 1, 16)
            ops.append_kv(key, key, *caches, int32([0, 2, -1, 1]), int32([4, 0, 0, -1]))
        else:
            ops.move_kv(
                *caches, int32([0, 2, 0, 1]), int32([0, 0, -1, 2]), int32([1, 0, 1, 2]),
                int32([2, 0, 0, 0]), int32([3, 1, 1, 1]),
            )  # fmt: skip
    assert all(not x.any() for x in caches)


BIG = 2**31 - 1


@functools.cache
def attention_case(dtype, query_length):
    """Arguments by name, and their results; the first row is split."""
    arguments = {
        "query": torch.randn(3 * query_length, 4, 64).to(dtype),
        "key_cache": torch.randn(3, 2, 700, 64).to(dtype),
        "value_cache": torch.randn(3, 2, 700, 64).to(dtype),
        "cu_seqlens_q": cumulative([query_length] * 3), "slots": int32([0, 1, 2]),
        "starts": int32([0, 1, 2]), "lengths": int32([600, 90, 40]),
    }  # fmt: skip
    return arguments, EMULATED["cuda-judged"].ragged_attention(**arguments, return_lse=True)


# The decode, the prefill and the generic kernel.
ATTENTION_KERNELS = pytest.mark.parametrize(
    ("dtype", "query_length"), [(torch.bfloat16, 1), (torch.bfloat16, 20), (torch.float32, 2)]
)


@pytest.mark.parametrize("late_copies", [False, True])
@pytest.mark.parametrize(
    ("threads", "warps", "blocks"),
    [(FORWARD, FORWARD, FORWARD), (BACKWARD, FORWARD, SHUFFLED), (SHUFFLED, BACKWARD, BACKWARD),
     (FORWARD, SHUFFLED, FORWARD), (SHUFFLED, SHUFFLED, SHUFFLED)],
)  # fmt: skip
@ATTENTION_KERNELS
def test_attention_does_not_depend_on_the_schedule(
    dtype, query_length, threads, warps, blocks, late_copies
):
    arguments, expected = attention_case(dtype, query_length)
    ops = EmulatedOps(
        build.FAST, threads=threads, warps=warps, blocks=blocks, late_copies=late_copies, seed=11
    )
    with ops.entered():
        actual = ops.ragged_attention(**arguments, return_lse=True)
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(got, want)


@ATTENTION_KERNELS
@pytest.mark.parametrize(
    "bad",
    [
        {"slots": [0, -1, 9]}, {"slots": [BIG, 1, -BIG]}, {"starts": [-1, 1, BIG]},
        {"starts": [101, 1, 2]}, {"lengths": [-5, 90, 701]}, {"lengths": [600, 700, 699]},
        {"starts": [BIG, 1, 1], "lengths": [BIG, 90, BIG]},
        {"cu_seqlens_q": [0, BIG, -BIG, 3]}, {"cu_seqlens_q": [-4, 0, 2, 90000]},
        {"cu_seqlens_q": [0, 3, 0, 3]}, {"cu_seqlens_q": [3, 2, 1, 0]},
    ],
)  # fmt: skip
def test_attention_over_values_out_of_range_stays_inside(dtype, query_length, bad):
    """Rows with such values are skipped, the others are right, and the judge finds no access
    outside of the tensors."""
    ops = EMULATED["cuda-judged"]
    with ops.entered():
        arguments, expected = attention_case(dtype, query_length)
        spoilt = arguments | {name: int32(values) for name, values in bad.items()}
        actual = ops.ragged_attention(**spoilt, return_lse=True)
    if "cu_seqlens_q" in bad:
        return
    right = [
        i for i in range(3)
        if all(spoilt[name][i] == arguments[name][i] for name in ("slots", "starts", "lengths"))
    ]  # fmt: skip
    assert len(right) < 3
    for i in right:
        row = slice(i * query_length, (i + 1) * query_length)
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got[row], want[row])


def test_reports_become_errors():
    """The region leaves out the last row, so the judge must report its use as a mistake."""
    ops = EMULATED["cuda-judged"]
    x = torch.randn(2, 1, 4, 16)
    with ops.entered(), pytest.raises(EmulationError, match="outside of every tensor"):
        ops.run(
            "move_kv",
            {n: int32([v]) for n, v in {"source_slots": 0, "source_starts": 0, "target_slots": 1,
                                        "target_starts": 0, "lengths": 4}.items()},
            {"key_cache": x[:1], "value_cache": x[:1]},
            num_moves=1, sizes=[1, 2, 1, 4, 16], dtype=0,
            key_cache_strides=[0, 64, 64, 16], value_cache_strides=[0, 64, 64, 16],
        )  # fmt: skip
