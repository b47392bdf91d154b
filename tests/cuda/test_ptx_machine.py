"""nvcc's own PTX of the kernels, executed: results, fragment layouts, planted defects."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from paged import paged_problem

from baton_kernels.testing import Accuracy, assert_same_bits, random_attention_problem
from emulation import build
from emulation.artifacts import ROOT
from emulation.ptx.counts import append_case, extract_case, insert_case, merge_case, move_case
from emulation.ptx.machine import Machine, compile_ptx
from emulation.ptx.ops import PtxOps
from emulation.static import kernels as cuda_static
from emulation.tools import cuda_include

CASES = [
    insert_case(60, 2, 3), extract_case(60, 2, 3), move_case(2, 2, 50, 7), append_case(20),
    append_case(20, 16), append_case(66, 12), merge_case(9, 8), insert_case(6, 20, 3),
    extract_case(6, 1, 3), insert_case(40, 1, 40), move_case(1, 1, 300, 140),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.what}")
def test_copies_and_merge(case):
    """nvcc's code on this machine compared with the host compiler's on the emulator."""
    ops = PtxOps()
    with ops.entered():
        getattr(ops, case.op)(**case.arguments)
    assert len(ops.machines) == 1 and ops.written
    for name, x in ops.written.items():
        y = ops.emulated[name]
        if case.op == "merge_attention":
            # nvcc contracts to fused multiply-adds, and it has its own exp.
            torch.testing.assert_close(x.float(), y.float(), rtol=2**-7, atol=2**-7)
        else:
            assert_same_bits(x, y)


# Query lengths, lengths, (num_heads, num_kv_heads), head_dim, options. Rows of one token go to the
# decode kernel, rows of several to prefill. Rows with more than 256 (decode) or 512 (prefill)
# columns are split and merged.
ATTENTION = {
    "decode": ([1, 1, 1], [90, 33, 17], (4, 2), 64, {"return_lse": True}),
    "decode, large group": ([1, 1], [70, 9], (12, 1), 96, {}),
    "decode, split": ([1], [700], (8, 2), 128, {"return_lse": True}),
    "decode, head_dim 80": ([1], [40], (3, 1), 80, {"window": 21, "softcap": 5.0}),
    "decode, head_dim 256": ([1], [75], (4, 2), 256, {}),
    "decode, split, in pages of 16": ([1, 1], [700, 90], (8, 2), 128, {"page": 16}),
    "decode, in pages of 7": ([1, 1], [90, 33], (4, 2), 64, {"page": 7}),
    "prefill, in pages of 16": ([40, 9], [60, 25], (4, 2), 64, {"page": 16}),
    "prefill": ([40, 9], [60, 25], (4, 2), 64, {"return_lse": True}),
    "prefill, head_dim 80": ([17], [40], (4, 2), 80, {"window": 13}),
    "prefill, split": ([20], [530], (2, 1), 128, {}),
    "prefill, head_dim 256": ([9], [30], (4, 2), 256, {}),
}


def attention(ops, name: str, dtype: torch.dtype):
    """The result of a case, and what the accuracy contract says about it."""
    query_lengths, lengths, (heads, kv_heads), head_dim, options = ATTENTION[name]
    problem = random_attention_problem(
        query_lengths, lengths, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim,
        dtype=dtype,
    )  # fmt: skip
    options = dict(options)
    page = options.pop("page", None)
    pages = page and paged_problem(problem, page).arguments
    with ops.entered():
        result = ops.ragged_attention(*() if pages else problem.args, **options, **pages or {})
    return result, Accuracy("ragged_attention", *problem.args, **options)


def readable(kernel: str) -> str:
    """`decode_kernelI6__halfLi64ELi1EE` as `decode_kernel<T, 64, 1>`."""
    numbers = ", ".join(re.findall(r"Li(\d+)E", kernel))
    return f"{kernel.partition('I')[0]}<T, {numbers}>"


DTYPES = (torch.bfloat16, torch.float16)


def is_executed(architecture: int, dtype: torch.dtype, number: int, name: str) -> bool:
    """nvcc takes longer than the machine. On sm_80 float16 has the code of bfloat16 with another
    type; on sm_75, which has products of float16 only, cases take turns."""
    if architecture == 80:
        return dtype == torch.bfloat16
    return number % 2 == (dtype == torch.bfloat16) and (
        dtype == torch.float16 or "pages" not in name
    )


EXECUTED = [
    pytest.param(
        architecture, dtype, name,
        marks=[] if is_executed(architecture, dtype, number, name) else [pytest.mark.full],
    )
    for architecture in (80, 75)
    for dtype in DTYPES
    for number, name in enumerate(ATTENTION)
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "dtype", "name"), EXECUTED)
def test_attention(architecture, dtype, name):
    """Padding is NaN and shared memory begins as NaN, as for every backend of the op's tests."""
    ops = PtxOps(architecture)
    result, accuracy = attention(ops, name, dtype)
    accuracy.check(result)
    kernels = [kernel.partition("_kernel")[0] for kernel, _ in ops.machines]
    assert ("ragged_attention_merge" in kernels) == ("split" in name)
    for kernel, machine in ops.machines:
        products = machine.instructions("mma.sync")
        assert machine.memory.shared_bytes == cuda_static.dynamic_shared(readable(kernel))
        busy = "merge" not in kernel and name.split(",")[0] in kernel
        assert (products > 0) == (busy and (architecture == 80 or dtype == torch.float16))


# Planted defects. The emulator reads python/emulation/cuda/ptx.h instead of
# csrc/cuda/device/ptx.h, so it cannot see mistakes in the latter's assembly.

DEFECTS = {
    "operands of mma swapped": (
        r"(f32\.bf16\.bf16\.f32 \"\s+\"\{%0, %1, %2, %3\}), \{%4, %5, %6, %7\}",
        r"\1, {%4, %6, %5, %7}",
        "decode",
    ),
    "halves of an operand swapped": (
        r"(f32\.bf16\.bf16\.f32 \"\s+\"\{%0, %1, %2, %3\}, \{%4, %5, %6, %7\}), \{%8, %9\}",
        r"\1, {%9, %8}",
        "prefill",
    ),
    "matrices of ldmatrix permuted": (
        r"(x4\.shared\.b16) \{%0, %1, %2, %3\}", r"\1 {%0, %2, %1, %3}", "prefill",
    ),
    "no transposition": (r"m8n8\.x4\.trans", "m8n8.x4", "prefill"),
    "no wait": (r"asm volatile\(\"cp\.async\.wait_group[^;]*;[^;]*;", ";", "prefill"),
}  # fmt: skip


# Only the kernels of the cases named above, which compile in a second.
FEW_KERNELS = """
#include "cuda/ragged_attention/decode.h"
#include "cuda/ragged_attention/prefill.h"
namespace baton::cuda {
void* kernels[] = {
    reinterpret_cast<void*>(ragged_attention_decode_kernel<__nv_bfloat16, 64, 1>),
    reinterpret_cast<void*>(ragged_attention_prefill_kernel<__nv_bfloat16, 64, 1>)};
}"""


@functools.cache
def preprocessed(csrc: Path) -> str:
    """The kernels' source after the emulator's preprocessor, without line marks."""
    command = [build.COMPILER, *build.COMMON, "-E", "-P", "-I", str(csrc), "-I", "python",
               "-isystem", str(cuda_include()), "-x", "c++", "-"]  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, input=FEW_KERNELS, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def planted(tmp_path):
    """A copy of the sources to plant defects in."""
    csrc = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    (csrc / "cuda" / "ragged_attention" / "bfloat16.cu").write_text(FEW_KERNELS)
    return csrc


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_copy_without_a_defect_is_right(planted, name):
    result, accuracy = attention(PtxOps(80, planted / "cuda"), name, torch.bfloat16)
    accuracy.check(result)


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_in_assembly_is_caught(defect, planted):
    pattern, replacement, name = DEFECTS[defect]
    header = planted / "cuda" / "device" / "ptx.h"
    text, count = re.subn(pattern, replacement, header.read_text())
    assert count == 1
    header.write_text(text)
    assert preprocessed(planted) == preprocessed(ROOT / "csrc")
    result, accuracy = attention(PtxOps(80, planted / "cuda"), name, torch.bfloat16)
    with pytest.raises(AssertionError):
        accuracy.check(result)


# The machine itself, on kernels of a few lines.


def run(tmp_path, body: str, x: torch.Tensor, block: int = 32, shared_bytes: int = 0) -> Machine:
    """`f(float* x)` with this body, executed once."""
    source = tmp_path / "kernel.cu"
    source.write_text(
        f"extern __shared__ float shared[]; __global__ void f_kernel(float* x) {{ {body} }}"
    )
    machine = Machine(compile_ptx(source, 80), "f_kernel")
    pointer = np.array(x.data_ptr(), np.uint64).tobytes()
    machine.launch((1, 1, 1), (block, 1, 1), [pointer], [x], shared_bytes)
    return machine


def test_loop_divergence_and_barrier(tmp_path):
    """Every thread's loop has a different length; a neighbor in another warp reads the sum."""
    x = torch.zeros(64)
    run(tmp_path, """
        float sum = 0;
        for (int i = 0; i <= threadIdx.x; ++i) sum += i;
        if (threadIdx.x % 3 == 0) sum = -sum;
        shared[threadIdx.x] = sum;
        __syncthreads();
        x[threadIdx.x] = shared[63 - threadIdx.x];""", x, 64, 256)  # fmt: skip
    i = torch.arange(63, -1, -1)
    assert torch.equal(x, torch.where(i % 3 == 0, -1.0, 1.0) * (i * (i + 1) / 2))


def test_comparisons_that_ask_about_nan(tmp_path):
    """Triton's code has `num` and `nan`, nvcc's also the unordered ones, as `gtu`."""
    x = torch.tensor([1.0, torch.nan, torch.inf, 3.0])
    machine = run(tmp_path, """
        float y = x[threadIdx.x], two = blockDim.x - 2;
        bool num = y == y, nan = y * two != y * two, gtu = !(y <= two);
        x[threadIdx.x] = num + 10 * nan + 100 * gtu;""", x, len(x))  # fmt: skip
    assert x.tolist() == [1, 110, 101, 101]
    kinds = {instruction.modifiers[0] for instruction in machine.code if instruction.name == "setp"}
    assert {"num", "nan", "gtu"} <= kinds


def test_shuffle_from_a_lane_that_is_elsewhere_is_caught(tmp_path):
    with pytest.raises(RuntimeError, match="without all of the lanes"):
        run(tmp_path, """
            if (threadIdx.x < 20) x[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
            else x[threadIdx.x] += 1;""", torch.zeros(32))  # fmt: skip


def test_addresses_outside_are_caught(tmp_path):
    x = torch.zeros(40)[:31].clone()
    with pytest.raises(IndexError, match="outside of every tensor"):
        run(tmp_path, "x[threadIdx.x] = 1;", x)
    with pytest.raises(IndexError, match="outside of shared memory"):
        run(tmp_path, "shared[threadIdx.x] = 1; __syncwarp(); x[0] = shared[3];", x, 32, 124)


@pytest.mark.parametrize(
    ("index", "sectors", "wavefronts"),
    [("threadIdx.x", 4, 1), ("threadIdx.x * 2", 8, 2), ("threadIdx.x * 32", 32, 32)],
)
def test_traffic_is_counted(tmp_path, index, sectors, wavefronts):
    x = torch.zeros(1024)
    machine = run(tmp_path, f"shared[{index}] = 1; x[{index}] = 1;", x, 32, 4096)
    assert (machine.sectors, machine.wavefronts, machine.ideal_wavefronts) == (
        sectors,
        wavefronts,
        1,
    )
