"""What this build is and where each op runs."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from baton_kernels import ops as op_functions
from baton_kernels import triton
from baton_kernels._library import ops

# Why an implementation is missing; "yes" where it is there.
_CUDA = "no: the CUDA kernels are not part of the package yet"


def _version() -> str:
    try:
        return importlib.metadata.version("baton_kernels")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (not installed as a package)"


def _triton(op: str) -> str:
    reason = triton.why_unavailable()
    if reason is not None:
        return f"no: {reason}"
    devices = triton.registered_devices(op)
    return f"yes (used on {', '.join(devices)})" if devices else "yes (when chosen by name)"


def build_info() -> dict[str, Any]:
    """Versions, the CPU's instruction sets, and which op runs where.

    Returns:
        `version`, `python`, `torch`, `threads`; `cpu` with `isa_compiled`, `isa_found` (both from
        the plainest to the best) and `isa_used`; `ops`: for each op, `cpu`, `cuda` and `triton`,
        each "yes" or "no: <why>".
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
        "version": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": {
            "machine": platform.machine(),
            "isa_compiled": compiled,
            "isa_found": found,
            "isa_used": used,
        },
        "ops": {
            name: {"cpu": f"yes ({used})", "cuda": _CUDA, "triton": _triton(name)}
            for name in op_functions.__all__
        },
    }
