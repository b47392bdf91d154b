"""Copies of the package whose CPU library is compiled in another way: with sanitizers, gcov's
counters, or other names of its ops."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_package(
    folder: Path, options: str, isas: Sequence[str] | None, namespace: str = "baton_kernels"
) -> None:
    """Builds the library into `folder`, and puts a copy of the package around it.

    Args:
        options: for the compiler and the linker, instead of -O3.
        isas: the instruction sets whose kernels are built, besides the baseline; None: all.
        namespace: of the ops.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    # CMake and ninja are taken from this Python's folder, if it has them.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    cmake = shutil.which("cmake", path=path) or "cmake"
    environment = {**os.environ, "PATH": path}
    subprocess.run(
        [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(folder / "cmake"),
            "-DCMAKE_BUILD_TYPE=Release", f"-DBATON_TORCH_DIR={torch}",
            f"-DCMAKE_CXX_FLAGS_RELEASE={options}",
            f"-DBATON_ISAS={';'.join([] if isas is None else ['baseline', *isas])}",
            f"-DBATON_NAMESPACE={namespace}",
        ],
        check=True, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    subprocess.run(
        [cmake, "--build", str(folder / "cmake"), "--target", "baton_kernels"],
        check=True, stdout=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    package = folder / "package" / "baton_kernels"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "baton_kernels", package, ignore=shutil.ignore_patterns("*.so", "*pyc"))
    shutil.copyfile(folder / "cmake" / "libbaton_kernels.so", package / "libbaton_kernels.so")


def environment(folder: Path) -> dict[str, str]:
    """The environment in which `import baton_kernels` finds the copy in this folder."""
    paths = [str(folder / "package"), str(ROOT / "python"), str(ROOT)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
