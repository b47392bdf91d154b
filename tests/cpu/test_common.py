"""csrc/common without anything around it: common.cpp."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_common(tmp_path):
    program = tmp_path / "common"
    subprocess.run(
        [os.environ.get("CXX", "g++").split()[0], "-std=c++20", "-O0", "-Wall", "-Wextra",
         "-Werror", "-I", "csrc", "tests/cpu/common.cpp", "csrc/common/dispatch.cpp",
         "-o", str(program)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
