"""The built library's AMX kernels on a CPU without AMX, as a backend of the ``ops`` fixture.

Each tile instruction is refused by the CPU and done in software (amx.cpp); everything else runs as
it is. The CPU must have AVX512-BF16, which the rest of these kernels is made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import baton_kernels
from baton_kernels.testing import cpu_isa
from emulation import build
from emulation.cuda.ops import EmulationError

# The ops that have AMX kernels.
OPS = ("linear", "ragged_attention")
CPUINFO = Path("/proc/cpuinfo")
COUNTS = ("configures", "releases", "zeros", "loads", "stores", "multiplies", "products")
FLAGS = (
    "-O2", "-mavx512f", "-mavx512bw", "-mfma",
    # GCC 12 takes undefined operands inside its own intrinsics for our uninitialized variables.
    "-Wno-uninitialized", "-Wno-maybe-uninitialized",
)  # fmt: skip


def has_model() -> bool:
    """Whether single instructions can be done in software: there are sources, and AVX-512."""
    found = baton_kernels.build_info()["cpu"]["isa_found"]
    return bool(build.KERNELS) and sys.platform == "linux" and "avx512_bf16" in found


def can_be_emulated() -> bool:
    """Whether the built kernels can run on the model: the CPU has all that they need but AMX.

    A CPU with AMX whose tiles Linux withholds would refuse only some of the instructions.
    """
    compiled = baton_kernels.build_info()["cpu"]["isa_compiled"]
    return has_model() and "amx_bf16" in compiled and "amx_tile" not in CPUINFO.read_text()


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled model."""
    loaded = ctypes.CDLL(str(build.build_library(Path(__file__).parent / "amx.cpp", *FLAGS)))
    loaded.take_fault.restype = ctypes.c_char_p
    return loaded


def check_faults() -> None:
    """Raises EmulationError if an instruction since the last call would have faulted."""
    fault = library().take_fault()
    if fault is not None:
        raise EmulationError(fault.decode())


def take_counts() -> dict[str, int]:
    """Executed instructions since the last call, and the products of elements they made."""
    values = (ctypes.c_int64 * len(COUNTS))()
    library().take_counts(values)
    return dict(zip(COUNTS, values, strict=True))


@contextlib.contextmanager
def entered() -> Iterator[None]:
    """Within the block every CPU kernel is one of the AMX set, and tiles are done in software."""
    library().emulate_begin()
    try:
        with cpu_isa("amx_bf16", force=True):
            yield
    finally:
        library().emulate_end()


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
