"""Describes this build and where each op runs."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from baton_kernels import ops as op_functions
from baton_kernels import triton
from baton_kernels._library import cuda, ops, why_no_cuda


def _version() -> str:
    """The installed version; if the package is not installed, a version below all others."""
    try:
        return importlib.metadata.version("baton_kernels")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


__version__ = _version()


def _triton(op: str) -> str:
    reason = triton.why_unavailable()
    if reason is not None:
        return f"no: {reason}"
    devices = triton.registered_devices(op)
    return f"yes (used on {', '.join(devices)})" if devices else "yes (when chosen by name)"


def has_native_cuda(op: str) -> bool:
    """Whether torch.ops.baton_kernels.<op> runs a kernel of csrc/cuda on NVIDIA GPUs."""
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"baton_kernels::{op}", "CUDA")
    return registered and "cuda" not in triton.registered_devices(op)


def _cuda(op: str) -> str:
    if why_no_cuda is not None:
        return f"no: {why_no_cuda}"
    return "yes" if has_native_cuda(op) else "no: Triton is this op's implementation for GPUs"


def _cuda_build() -> dict[str, Any]:
    if cuda is None:
        return {"architectures": [], "toolkit": "", "why_not": why_no_cuda}
    version, *numbers = map(int, ops.cuda_build().split())
    return {
        # The last architecture is included as PTX too, for all newer ones.
        "architectures": [f"sm_{number}" for number in numbers],
        "toolkit": f"{version // 1000}.{version % 1000 // 10}",
        "why_not": None,
    }


def build_info() -> dict[str, Any]:
    """Versions, the CPU's instruction sets, and which op runs where.

    Returns:
        `version`, `python`, `torch`, `threads`; `cpu` with `isa_compiled`, `isa_found` (both from
        the plainest to the best) and `isa_used`; `cuda` with `architectures` (those compiled; the
        last one also as PTX, for all newer GPUs), `toolkit` and `why_not` (None if the CUDA
        library is loaded); `ops`: for each op, `cpu`, `cuda` and `triton`, each "yes" or
        "no: <why>".
    """
    compiled, found, used = [], [], ""
    for line in ops.cpu_isas().splitlines():
        name, is_compiled, is_found, is_used = line.split()
        if is_compiled == "1":
            compiled.append(name)
        if is_found == "1":
            found.append(name)
        if is_used == "1":
            used = name
    return {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": {
            "machine": platform.machine(),
            "isa_compiled": compiled,
            "isa_found": found,
            "isa_used": used,
        },
        "cuda": _cuda_build(),
        "ops": {
            name: {"cpu": f"yes ({used})", "cuda": _cuda(name), "triton": _triton(name)}
            for name in op_functions.__all__
        },
    }
