"""Makes the folder to take to a machine with a GPU: `make gpu-carry`. Needs no GPU itself.

Such a machine may have no network and an older torch, and has no time to spend on a compiler. The
folder contains both libraries, compiled for its architecture only, and the peers that it may lack:
as archives, because the transfer limit counts bytes. A peer that cannot be obtained is left out,
and a message says so. The command to run there is printed last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from .. import commit
from .carried import COMMIT, FOLDER, LIBRARIES, PEERS

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu-carry-build"
# Compute capabilities of the machine's GPU.
ARCHITECTURES = "90"
PYTHON, MEBIBYTES = "3.12", 64
# Wheels that are taken unchanged. The last three run the tests in processes that are replaced.
WHEELS = ("fa3-fwd==0.0.3", "pytest-xdist", "execnet", "pytest-timeout")


def run(*command: str | Path, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, **options)


def libraries(folder: Path, architectures: str) -> None:
    """The CPU library as `make setup` built it, and the CUDA library compiled with this
    environment's torch, which may lack CUDA.

    Then only libtorch_cuda.so is missing at link time. An empty library of that name is enough: the
    symbols are resolved on the machine whose torch has CUDA.
    """
    sys.path.insert(0, str(ROOT))
    import cmake

    stubs = BUILD / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    run(
        "c++", "-shared", "-x", "c", os.devnull, "-o", stubs / "libtorch_cuda.so",
        "-Wl,-soname,libtorch_cuda.so",
    )  # fmt: skip
    torch = Path(sysconfig.get_path("platlib")) / "torch"
    tools = Path(sys.executable).parent
    nvcc = os.environ.get("CUDACXX") or find_nvcc()
    runtime = Path(nvcc).resolve().parent.parent / "lib"
    flags = [f"-DCMAKE_CUDA_FLAGS=-L{runtime}"] if runtime.is_dir() else []
    program = Path(cmake.CMAKE_BIN_DIR) / "cmake"
    run(
        program, "-G", "Ninja", "-S", ROOT, "-B", BUILD / "cmake", "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}", f"-DBATON_TORCH_DIR={torch}",
        "-DBATON_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}",
        f"-DBATON_CUDA_ARCHITECTURES={architectures}",
        # The linker would drop an empty library unless it is told to keep it.
        f"-DCMAKE_MODULE_LINKER_FLAGS=-L{stubs} -Wl,--no-as-needed", *flags,
    )  # fmt: skip
    run(program, "--build", BUILD / "cmake", "--target", "baton_kernels_cuda")
    (folder / LIBRARIES).mkdir(parents=True)
    shutil.copy(BUILD / "cmake" / "libbaton_kernels_cuda.so", folder / LIBRARIES)
    shutil.copy(ROOT / "baton_kernels" / "libbaton_kernels.so", folder / LIBRARIES)


def find_nvcc() -> str:
    """nvcc: the machine's, otherwise that of this environment's packages.

    Raises:
        SystemExit: nvcc was not found.
    """
    packages = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    for path in (None, "/usr/local/cuda/bin", str(packages)):
        found = shutil.which("nvcc", path=path)
        if found:
            return found
    raise SystemExit("make gpu-carry: nvcc 13 is needed, and none was found: set CUDACXX")


def download(folder: Path, *requirements: str) -> list[Path]:
    """Wheels for the other machine's Python, without their dependencies."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (28, 24, 17)]
    run(
        sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download",
        "--no-deps", "--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp",
        *platforms, "--platform=manylinux2014_x86_64", f"--dest={folder}", *requirements,
    )  # fmt: skip
    return sorted(folder.glob("*.whl"))


def peers(folder: Path) -> list[str]:
    """Fetches and builds the peers; returns which are there, and which are missing and why."""
    from .flashinfer import pack

    target = folder / PEERS
    target.mkdir(parents=True)
    lines = []
    for requirement in WHEELS:
        name = requirement.partition("==")[0]
        try:
            for wheel in download(BUILD / "wheels" / name, requirement):
                shutil.copy(wheel, target)
            lines.append(f"{requirement}: as a wheel")
        except (OSError, subprocess.CalledProcessError) as error:
            lines.append(f"{requirement}: left out: {error}")
    try:
        pack(target, BUILD / "flashinfer", download)
        lines.append("FlashInfer: with its decode modules compiled ahead")
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        lines.append(f"FlashInfer: left out: {error}")
    return lines


def size(*paths: Path) -> int:
    return sum(
        file.stat().st_size
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*"))
        if file.is_file() and not file.is_symlink()
    )


def tree_bytes() -> int:
    """Bytes of the files that travel with the sources: those that git does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    try:
        names = subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0")
    except (OSError, subprocess.CalledProcessError):
        return 0
    return size(*(ROOT / name.decode() for name in names if name))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; 1 when the folder is too large to travel."""
    parser = argparse.ArgumentParser(prog="make gpu-carry", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--architectures", default=ARCHITECTURES, help="as CMake lists them")
    parser.add_argument("--no-peers", action="store_true", help="the libraries only")
    options = parser.parse_args(argv)
    folder = options.output.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    libraries(folder, options.architectures)
    lines = [] if options.no_peers else peers(folder)
    (folder / COMMIT).write_text(commit() + "\n")
    carried, tree = size(folder), tree_bytes()
    total = (carried + tree) / 2**20
    print("\n" + "\n".join(lines))
    print(f"{carried / 2**20:.1f} MiB in {folder}, {tree / 2**20:.1f} MiB of sources")
    if total > MEBIBYTES:
        print(f"make gpu-carry: must be at most {MEBIBYTES} MiB, got {total:.1f}", file=sys.stderr)
        return 1
    where = os.path.relpath(folder, ROOT)
    print(
        f"Take the sources and {where} to the machine with the GPU. There, in two calls:\n"
        "  python3 -m bench.gpu_day --minutes 8.5 --part correct --output OUTPUT\n"
        "  python3 -m bench.gpu_day --minutes 9 --part figures --output OUTPUT\n"
        "or in one: --part all. docs/gpu.md says what comes out."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
