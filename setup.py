"""Builds the wheel: runs CMake for the compiled extension, everything else is in pyproject.toml."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
INSTALL_TORCH = "install it first, for example `pip install torch`, then run this command again"


def find_torch() -> Path:
    """Folder of the torch that the extension is built for; its headers are all the build reads.

    pip builds in an isolated environment that hides the installed torch. Its folder is found
    through sysconfig all the same, which spares everyone a second download of torch.
    """
    folders = [*sys.path, sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    for folder in folders:
        torch = Path(folder or ".") / "torch"
        if (torch / "version.py").is_file() and (torch / "include").is_dir():
            break
    else:
        raise SystemExit(
            f"baton_kernels: torch >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} is needed to compile, "
            f"and none is installed for {sys.executable}: {INSTALL_TORCH} "
            "(with `python -m build`, add --no-isolation)"
        )
    version = re.search(r"__version__\s*=\s*'([^']+)'", (torch / "version.py").read_text())
    numbers = tuple(int(part) for part in version[1].split(".")[:2]) if version else (0, 0)
    if numbers < MINIMUM_TORCH:
        raise SystemExit(
            f"baton_kernels: torch must be >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]}, got "
            f"{version[1] if version else 'an unknown version'}: `pip install -U torch`"
        )
    return torch


def find_compiler() -> str:
    """The C++ compiler, or an error that says what to install."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not compiler or not shutil.which(compiler.split()[0]):
        raise SystemExit(
            "baton_kernels: a C++20 compiler is needed to compile, and none was found: install one "
            "(Debian: apt-get install g++; Fedora: dnf install gcc-c++; conda: cxx-compiler) or "
            "point CXX at it"
        )
    return compiler


def find_tool(name: str) -> str:
    """Path of cmake or ninja: of the Python package of that name, else of the system."""
    try:
        package = importlib.import_module(name)
        folder = getattr(package, "BIN_DIR", None) or getattr(package, "CMAKE_BIN_DIR", "")
    except ImportError:
        folder = ""
    tool = shutil.which(name, path=folder) if folder else None
    tool = tool or shutil.which(name)
    if not tool:
        raise SystemExit(f"baton_kernels: {name} is needed to compile: `pip install {name}`")
    return tool


class CMakeBuild(build_ext):
    """Compiles the extension with CMake and ninja into the place setuptools expects."""

    def build_extension(self, ext):
        torch, compiler = find_torch(), find_compiler()
        # Beside the sources, so that a second build compiles only what changed.
        build = ROOT / "build" / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake = find_tool("cmake")
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_COMPILER={compiler.split()[0]}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DBATON_TORCH_DIR={torch}",
            f"-DBATON_PYTHON_INCLUDE={sysconfig.get_path('include')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never written over: a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copyfile(build / "_C.abi3.so", target)


class AbiWheel(bdist_wheel):
    """Tags the wheel for every CPython from 3.10 on."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "cp310", "abi3", platform


setup(
    ext_modules=[Extension("baton_kernels._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AbiWheel},
)
