"""No bit of padding or of a hidden key reaches a result of the CPU kernels, at any value; checked
with valgrind's memcheck (taint.cpp)."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The installed kernels, which the package's build leaves here.
KERNELS = ROOT / "build" / "cmake" / "libbaton_cpu.a"
HEADER = Path("/usr/include/valgrind/memcheck.h")

pytestmark = pytest.mark.skipif(
    not (shutil.which("valgrind") and HEADER.exists() and KERNELS.exists()),
    reason="needs valgrind with its headers (`apt-get install valgrind`), and build/cmake",
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    program = tmp_path_factory.mktemp("taint") / "taint"
    subprocess.run(
        [os.environ.get("CXX", "g++").split()[0], "-std=c++20", "-O1", "-g", "-Wall", "-Wextra",
         "-Werror", "-pthread", "-I", "csrc", "tests/cpu/taint.cpp",
         "csrc/bindings/attention_plan.cpp", str(KERNELS), "-o", str(program)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    return program


def run(program: Path, *arguments: str) -> tuple[int, str]:
    """Exit status, and the last line of the output."""
    done = subprocess.run(
        ["valgrind", "-q", "--error-limit=no", "--num-callers=4", program, *arguments],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout.splitlines()[-1]


# Under valgrind the CPU has at most AVX2, and that takes ten times as long.
@pytest.mark.parametrize("isa", ["baseline", pytest.param("avx2", marks=pytest.mark.full)])
def test_results_are_known_where_padding_and_hidden_keys_are_not(isa, program):
    status, line = run(program, isa)
    assert status == 0, line
    counts = [int(number) for number in re.findall(r"(\d+) (?:results|tainted|branches)", line)]
    (results, tainted, branches), (hidden_results, hidden_tainted) = counts[:3], counts[3:]
    assert results > 50 and hidden_results > 500
    assert tainted == branches == hidden_tainted == 0


def test_padding_that_is_multiplied_by_zero_is_found(program):
    status, line = run(program, "baseline", "planted")
    assert status == 1
    tainted = [int(number) for number in re.findall(r"(\d+) tainted", line)]
    assert min(tainted) > 5
