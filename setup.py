"""Builds the wheel: runs CMake for the compiled libraries, everything else is in pyproject.toml."""

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
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).parent.resolve()
MINIMUM_TORCH = (2, 10)
INSTALL_TORCH = "install it first, for example `pip install torch`, then run this command again"


def find_torch() -> Path:
    """Folder of the torch that the libraries are built for; its headers are all the build reads.

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


def find_nvcc() -> str | None:
    """nvcc: the one that CUDACXX names, on the PATH, of the CUDA folder, or of PyPI's package."""
    if os.environ.get("CUDACXX"):
        return os.environ["CUDACXX"]
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    sites = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path)
    folders = [Path(cuda), *(Path(site or ".") / "nvidia" / "cu13" for site in sites)]
    return shutil.which("nvcc") or shutil.which(
        "nvcc", path=os.pathsep.join(str(folder / "bin") for folder in folders)
    )


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; False without torch, which the build reports."""
    try:
        return (find_torch() / "lib" / "libtorch_cuda.so").is_file()
    except SystemExit:
        return False


def builds_cuda() -> bool:
    """BATON_CUDA=1 or 0, or by default: where nvcc and a CUDA torch are, GPU or not."""
    wanted = os.environ.get("BATON_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"baton_kernels: BATON_CUDA must be 0, 1 or unset, got {wanted!r}")
    return wanted == "1" or (wanted == "" and find_nvcc() is not None and torch_has_cuda())


def cuda_options() -> list[str]:
    """CMake's options for the CUDA kernels."""
    nvcc = find_nvcc()
    if not nvcc:
        raise SystemExit(
            "baton_kernels: BATON_CUDA=1 needs nvcc 13, and none was found: install the CUDA "
            "toolkit or point CUDACXX at its nvcc"
        )
    if not torch_has_cuda():
        raise SystemExit(
            "baton_kernels: BATON_CUDA=1 needs a CUDA build of torch, and the one in "
            f"{find_torch()} has no CUDA"
        )
    options = ["-DBATON_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    # PyPI's nvcc looks for its runtime in lib64, which its packages call lib.
    lib = Path(shutil.which(nvcc) or nvcc).resolve().parent.parent / "lib"
    if (lib / "libcudart_static.a").is_file():
        options.append(f"-DCMAKE_CUDA_FLAGS=-L{lib}")
    architectures = os.environ.get("BATON_CUDA_ARCHITECTURES", "")
    if not re.fullmatch(r"(\d+(;\d+)*)?", architectures):
        raise SystemExit(
            'baton_kernels: BATON_CUDA_ARCHITECTURES must be like "80;90;120", got '
            f"{architectures!r}"
        )
    if architectures:
        options.append(f"-DBATON_CUDA_ARCHITECTURES={architectures}")
    else:
        options.append("-UBATON_CUDA_ARCHITECTURES")  # not those of the last build
    return options


class CMakeBuild(build_ext):
    """Compiles the libraries with CMake and ninja into the place setuptools expects.

    setuptools calls them extensions. They are not Python modules: torch.ops.load_library loads
    them.
    """

    def finalize_options(self):
        self.cuda = builds_cuda()
        if self.cuda:
            self.distribution.ext_modules.append(library("baton_kernels_cuda"))
        super().finalize_options()

    def run(self):
        # An older build with CUDA may have left its library where this one is put together.
        if not self.cuda:
            folders = [Path(self.build_lib) / "baton_kernels"]
            if self.editable_mode:
                folders.append(ROOT / "baton_kernels")
            for folder in folders:
                (folder / "libbaton_kernels_cuda.so").unlink(missing_ok=True)
        super().run()

    def get_ext_filename(self, fullname):
        # Without the tag of one Python, which setuptools gives to a module.
        package, _, name = fullname.rpartition(".")
        return os.path.join(package, f"lib{name}.so")

    def build_extension(self, ext):
        torch, compiler = find_torch(), find_compiler()
        cuda = cuda_options() if self.cuda else ["-DBATON_CUDA=OFF"]
        # Next to the sources, so that a second build compiles only what changed.
        build = ROOT / "build" / ("cmake-cuda" if self.cuda else "cmake")
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        cmake, name = find_tool("cmake"), ext.name.rpartition(".")[2]
        configure = [
            cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_CXX_COMPILER={compiler.split()[0]}",
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DBATON_TORCH_DIR={torch}",
            *cuda,
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--target", name], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Never written over: a process may have the old one mapped.
        target.unlink(missing_ok=True)
        shutil.copyfile(build / target.name, target)


class Editable(editable_wheel):
    """An editable install also finds what only a checkout has: the tests and bench import it."""

    def finalize_options(self):
        super().finalize_options()
        self.distribution.packages += ["bench", "emulation"]
        self.distribution.package_dir |= {"bench": "bench", "emulation": "python/emulation"}


class EveryPython(bdist_wheel):
    """Tags the wheel for one platform and every Python: nothing in it was compiled for one."""

    def get_tag(self):
        _, _, platform = super().get_tag()
        return "py3", "none", platform


def library(name: str) -> Extension:
    """A library of the package; CMake knows its sources."""
    return Extension(f"baton_kernels.{name}", sources=[])


setup(
    ext_modules=[library("baton_kernels")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": EveryPython, "editable_wheel": Editable},
)
