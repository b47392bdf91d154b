"""A machine with two GPUs, as far as one without any can test it."""

import os
import subprocess
from pathlib import Path

import torch
from gpus import needs_two_gpus

import baton_kernels
from baton_kernels.testing import assert_same_bits, int32
from emulation.tools import cuda_include

ROOT = Path(__file__).resolve().parents[2]
DEVICE = "csrc/bindings/cuda/cuda_device.cpp"


def built(scratch, source):
    program = scratch / "two_gpus"
    folder = Path(torch.__file__).parent
    subprocess.run(
        [
            os.environ.get("CXX", "g++").split()[0], "-std=c++20", "-O1", "-Wall", "-Wextra",
            "-Werror", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000",
            "-DUSE_CUDA", "-I", "csrc",
            "-isystem", str(folder / "include"), "-isystem", str(cuda_include()),
            "tests/cuda/two_gpus.cpp", str(source), "-o", str(program),
            # For what the program does not stand in for: the numbers of dtypes.
            f"-L{folder / 'lib'}", f"-Wl,-rpath,{folder / 'lib'}", "-ltorch_cpu", "-lc10",
        ],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return subprocess.run([program], capture_output=True, text=True, timeout=60)


def test_both_runtimes_are_on_the_device_of_a_call(tmp_path):
    done = built(tmp_path, DEVICE)
    assert done.returncode == 0, done.stderr


def test_a_runtime_that_stays_where_it_was_is_found(tmp_path):
    """A planted defect: nothing but torch's guard is left."""
    source, line = (ROOT / DEVICE).read_text(), "  finish(cudaSetDevice(device));\n"
    assert line in source
    defect = tmp_path / "cuda_device.cpp"
    defect.write_text(source.replace(line, ""))
    done = built(tmp_path, defect)
    assert done.returncode == 1 and "launched_on == device" in done.stderr


@needs_two_gpus
def test_gpu_calls_on_the_second_device():
    """Torch's current device is the first one; then a call on that one follows."""
    key, value = torch.randn(2, 5, 2, 16)
    index = [int32([0, 5]), int32([1]), int32([2])]
    for number in (1, 0, 1):
        caches = [torch.zeros(3, 2, 12, 16, device=f"cuda:{number}") for _ in range(2)]
        given = [x.to(caches[0].device) for x in (key, value, *index)]
        baton_kernels.insert_kv(*given[:2], *caches, *given[2:])
        assert_same_bits(caches[0][1, :, 2:7].cpu(), key.transpose(0, 1))
        assert torch.cuda.current_device() == 0
