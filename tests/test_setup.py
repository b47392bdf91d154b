"""The errors of setup.py before it compiles anything for CUDA."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"BATON_CUDA": "yes"}, "BATON_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"BATON_CUDA": "1", "CUDACXX": "nvcc"}, "BATON_CUDA=1 needs a CUDA build of torch"),
        (
            {"BATON_CUDA": "1", "CUDACXX": "", "PATH": "/nowhere", "CUDA_HOME": "/nowhere"},
            "BATON_CUDA=1 needs nvcc 13, and none was found",
        ),
    ],
)
def test_a_wrong_setting_ends_the_build(tmp_path, settings, expected):
    if "CUDA build of torch" in expected and torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    if "nvcc" in expected and list(
        Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc")
    ):
        pytest.skip("nvcc is one of this environment's packages")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", tmp_path, "-t", tmp_path],
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
