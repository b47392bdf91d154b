"""The AMX kernels on emulated tile instructions, as a backend of the ``ops`` fixture.

CMake compiles csrc/cpu once more, as it does for every instruction set, into a library that only
the tests load; ``torch.ops`` then runs its kernels behind the same checks as all others.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import baton_kernels
from emulation.ops import EmulationError

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "emulation-amx"
# The ops with AMX kernels of their own.
OPS = ("linear", "ragged_attention")
COUNTS = ("configures", "releases", "zeros", "loads", "stores", "multiplies")


def can_be_emulated() -> bool:
    """Whether there are sources to compile, and a CPU for all of a kernel but its tiles."""
    found = baton_kernels.build_info()["cpu"]["isa_found"]
    sources = (ROOT / "csrc" / "cpu").is_dir() and (ROOT / "CMakeLists.txt").is_file()
    return sources and platform.machine() == "x86_64" and "avx512_bf16" in found


def _tool(name: str) -> str:
    """cmake or ninja: of the Python packages that the build uses, else of the system."""
    path = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if path is None:
        raise FileNotFoundError(f"{name} is needed to compile: `pip install {name}`")
    return path


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library; ninja builds what is older than its sources."""
    BUILD.mkdir(parents=True, exist_ok=True)
    configure = [
        _tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD),
        f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DBATON_EMULATION=ON",
    ]  # fmt: skip
    build = [configure[0], "--build", str(BUILD), "--target", "baton_amx_emulated"]
    # Several test processes may want it.
    with open(BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, build):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    loaded = ctypes.CDLL(str(BUILD / "libbaton_amx_emulated.so"))
    loaded.kernel_table.restype = ctypes.c_void_p
    loaded.take_fault.restype = ctypes.c_char_p
    return loaded


def check_faults() -> None:
    """Raises EmulationError if an instruction since the last call would have faulted."""
    fault = library().take_fault()
    if fault is not None:
        raise EmulationError(fault.decode())


def take_counts() -> dict[str, int]:
    """Executed instructions since the last call."""
    values = (ctypes.c_int64 * len(COUNTS))()
    library().take_counts(values)
    return dict(zip(COUNTS, values, strict=True))


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Within the block every CPU kernel is one of the emulated library."""
    torch.ops.baton_kernels.set_cpu_kernels(library().kernel_table())
    try:
        yield
    finally:
        torch.ops.baton_kernels.set_cpu_isa("auto")


class AmxOps:
    """The ops of the backend; a fault becomes an `EmulationError`."""

    def __getattr__(self, name: str) -> Callable:
        if name not in OPS:
            raise AttributeError(name)

        def run(*args: object, **kwargs: object) -> object:
            result = getattr(baton_kernels, name)(*args, **kwargs)
            check_faults()
            return result

        return run
