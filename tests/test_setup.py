"""The errors of setup.py before it compiles anything for CUDA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# setup.py on a machine without nvcc, and with a torch without CUDA.
WITHOUT_CUDA = """
import pathlib, runpy, shutil, sys

which, is_file = shutil.which, pathlib.Path.is_file
shutil.which = lambda name, **options: None if name == "nvcc" else which(name, **options)
pathlib.Path.is_file = lambda path: path.name != "libtorch_cuda.so" and is_file(path)
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"BATON_CUDA": "yes"}, "BATON_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"BATON_CUDA": "1", "CUDACXX": "nvcc"}, "BATON_CUDA=1 needs a CUDA build of torch"),
        ({"BATON_CUDA": "1", "CUDACXX": ""}, "BATON_CUDA=1 needs nvcc 13, and none was found"),
    ],
)
def test_a_wrong_setting_ends_the_build(tmp_path, settings, expected):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CUDA, "-q", "build_ext", "-b", tmp_path, "-t", tmp_path],
        cwd=ROOT,
        env={"CXX": sys.executable, **os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert expected in done.stderr


def test_the_oldest_torch_is_the_same_everywhere():
    """scripts/oldest_torch.sh compiles with the version that setup.py names."""
    promises = {
        "setup.py": r"MINIMUM_TORCH = \((\d+), (\d+)\)",
        "baton_kernels/_library.py": r"MINIMUM_TORCH = \((\d+), (\d+)\)",
        "pyproject.toml": r'dependencies = \["torch>=(\d+)\.(\d+)"\]',
        "CMakeLists.txt": r"TORCH_TARGET_VERSION=0x(\w\w)(\w\w)0{12}",
        "README.md": r"torch from (\d+)\.(\d+)",
    }
    found = {}
    for name, pattern in promises.items():
        numbers = re.search(pattern, (ROOT / name).read_text()).groups()
        base = 16 if name == "CMakeLists.txt" else 10
        found[name] = tuple(int(number, base) for number in numbers)
    assert len(set(found.values())) == 1, found
