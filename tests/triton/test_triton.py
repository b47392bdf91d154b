"""The Triton kernels as part of the package: names, errors, registration, life without triton."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch
from op_tables import table

import baton_kernels

OPS = baton_kernels.triton.OPS
GPU_KEYS = ("CUDA", "XPU")


@pytest.mark.parametrize("op", OPS)
def test_signature_is_the_ops(op):
    assert inspect.signature(getattr(baton_kernels.triton, op)) == inspect.signature(
        getattr(baton_kernels, op)
    )


def test_every_op_is_here():
    assert set(OPS) == set(baton_kernels.ops.__all__)


@pytest.mark.parametrize("op", OPS)
def test_an_imported_file_does_not_hide_its_op(op):
    importlib.import_module(f"baton_kernels.triton.{op}")
    assert inspect.isfunction(getattr(baton_kernels.triton, op))


@pytest.mark.parametrize("op", OPS)
def test_errors_are_the_ops(op, monkeypatch):
    """The op's own table of bad arguments; only C++ checks index values."""
    bad, arguments = table(op)
    ours = getattr(baton_kernels.triton, op)
    checked = 0
    for refusal in bad.values():
        if "fake" in refusal.routes:
            refusal.check(op, arguments(), "python")
            with monkeypatch.context() as patch:
                patch.setattr(baton_kernels, op, ours)
                refusal.check(op, arguments(), "python")
            checked += 1
    assert checked > 3


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_runs_on_the_cpu(op):
    with pytest.raises(ValueError, match=rf"{op}: \w+ must be on a GPU .*, got cpu"):
        getattr(baton_kernels.triton, op)(**table(op)[1]())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", GPU_KEYS)
def test_every_gpu_has_a_kernel(op, key):
    for overload in getattr(torch.ops.baton_kernels, op).overloads():
        if overload.startswith("scaled"):
            continue  # eight-bit caches, for which only the CPU has kernels
        name = f"baton_kernels::{op}" + ("" if overload == "default" else f".{overload}")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), name


@pytest.mark.parametrize("op", OPS)
def test_build_info_says_where(op):
    devices = baton_kernels.triton.registered_devices(op)
    use = f"used on {', '.join(devices)}" if devices else "when chosen by name"
    assert baton_kernels.build_info()["ops"][op]["triton"] == f"yes ({use})"


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_triton_is_imported_when_it_is_used():
    done = run_python("import baton_kernels, sys; print('triton' in sys.modules)")
    assert done.stdout.strip() == "False"


def test_without_triton():
    done = run_python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, baton_kernels\n"
        "print(baton_kernels.build_info()['ops']['rms_norm']['triton'])\n"
        "print(baton_kernels.silu_and_mul(torch.zeros(1, 4)).tolist())\n"
        "try:\n"
        "    baton_kernels.triton.rms_norm\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    lines = done.stdout.splitlines()
    assert lines[0] == "no: triton is not installed"
    assert lines[1] == "[[0.0, 0.0]]"
    assert lines[2].startswith("baton_kernels.triton.rms_norm: triton is not installed: `pip")


def test_launches_are_bounded_by_what_the_host_knows():
    """Without memory behind the tensors nothing can be read back: a launch needs only shapes."""
    common = importlib.import_module("baton_kernels.triton.common")
    cache = torch.empty(64, 8, 4096, 128, dtype=torch.float16, device="meta")
    index = torch.empty(64, dtype=torch.int32, device="meta")
    query = torch.empty(64, 32, 128, dtype=torch.float16, device="meta")
    cu_seqlens = torch.empty(65, dtype=torch.int32, device="meta")
    rows = (query, cache, cache, cu_seqlens, index, index, index)

    def programs(**bounds):
        with common.recording() as launches:
            baton_kernels.triton.ragged_attention(*rows, **bounds)
        return {launch.kernel.__name__: launch.programs for launch in launches}

    # 64 rows x 8 KV heads x 8 splits of a capacity of 4096; 64 tokens could also be one prefill.
    few, merge, many = "attend_few_kernel", "merge_splits_kernel", "attend_many_kernel"
    assert programs() == {few: 4096, merge: 512, many: 8 * (4 + 15)}
    assert programs(max_query_length=1) == {few: 4096, merge: 512}
    assert programs(max_query_length=1, max_length=500) == {few: 512}
