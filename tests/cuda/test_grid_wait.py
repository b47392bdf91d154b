"""The merge is launched behind the kernels whose partial results it reads, and waits for them.

nvcc's PTX for sm_90 on the machine of emulation/ptx: until a thread has executed
griddepcontrol.wait it sees what memory held before the launches that its own is behind.
"""

import shutil
from pathlib import Path

import pytest
import torch

from baton_kernels.testing import Accuracy, random_attention_problem
from emulation.artifacts import ROOT
from emulation.ptx.ops import PtxOps

# Compiled in seconds.
DECODE = """
#include "cuda/ragged_attention/decode.h"
namespace baton::cuda {
void* decode = reinterpret_cast<void*>(ragged_attention_decode_kernel<__nv_bfloat16, 64, 1>);
}"""
MERGE = """
#include "cuda/ragged_attention/merge.h"
namespace baton::cuda {
void* merge[] = {reinterpret_cast<void*>(ragged_attention_merge_kernel<__nv_bfloat16, 1>),
                 reinterpret_cast<void*>(ragged_attention_merge_kernel<__nv_bfloat16, 4>)};
}"""


@pytest.fixture
def csrc(tmp_path):
    """A copy of the sources with few kernels, to plant defects in."""
    csrc = Path(shutil.copytree(ROOT / "csrc", tmp_path / "csrc"))
    folder = csrc / "cuda" / "ragged_attention"
    (folder / "bfloat16.cu").write_text(DECODE)
    (folder / "ragged_attention.cu").write_text(MERGE)
    return csrc


def change(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, after))


def decode(csrc: Path, rows: int = 1) -> tuple[PtxOps, torch.Tensor, Accuracy]:
    """Rows of three splits; of one row, each lane of the merge has one dim."""
    ops = PtxOps(90, csrc / "cuda")
    problem = random_attention_problem(
        [1] * rows, [700] * rows, num_heads=8, num_kv_heads=1, dtype=torch.bfloat16
    )
    with ops.entered():
        result = ops.ragged_attention(*problem.args, max_query_length=1)
    return ops, result, Accuracy("ragged_attention", *problem.args)


@pytest.mark.parametrize(("rows", "dims"), [(1, 1), (3, 4)])
def test_merge_waits_for_the_partial_results(csrc, rows, dims):
    ops, result, accuracy = decode(csrc, rows)
    accuracy.check(result)
    (_, first), (name, merge) = ops.machines
    assert f"Li{dims}E" in name
    assert first.instructions("griddepcontrol.launch_dependents") > 0
    # Rows are found before: what is left is to load, weigh and sum.
    assert 0 < merge.waits_from < merge.instructions()


def test_a_missing_wait_is_caught(csrc):
    change(csrc / "cuda" / "device" / "ptx.h", 'asm volatile("griddepcontrol.wait;" ::: "memory");',
           "")  # fmt: skip
    with pytest.raises(RuntimeError, match="before griddepcontrol.wait"):
        decode(csrc)


def test_a_wait_behind_the_loads_is_caught(csrc):
    merge = csrc / "cuda" / "ragged_attention" / "merge.h"
    change(merge, "  wait_for_grid_before();\n", "")
    change(merge, "    const Finished f = ", "    wait_for_grid_before();\n    const Finished f = ")
    _, result, accuracy = decode(csrc)
    with pytest.raises(AssertionError):
        accuracy.check(result)
