"""The ops as Triton kernels, for GPUs without the CUDA library and for comparison with it.

`baton_kernels.triton.<op>` has the signature, the results and the errors of `baton_kernels.<op>`.
torch.ops.baton_kernels.<op> runs these kernels on every GPU for which no other implementation is
registered (AMD, Intel, or NVIDIA without the CUDA library). Neither this package nor the
registration imports triton before a kernel is used.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from baton_kernels import _library

OPS = (
    "append_kv",
    "attention_mask",
    "extract_kv",
    "insert_kv",
    "likeliest",
    "linear",
    "masked_softmax",
    "merge_attention",
    "move_kv",
    "ragged_attention",
    "rms_norm",
    "silu_and_mul",
)
__all__ = [*OPS, "registered_devices", "why_unavailable"]

# ROCm's torch calls its devices and its dispatch key CUDA as well.
_DEVICES = {"cuda": "CUDA", "xpu": "XPU"}
_registered: dict[str, tuple[str, ...]] = {}
# Holds the registrations: they end with this object.
_registrations = torch.library.Library("baton_kernels", "IMPL")


def why_unavailable() -> str | None:
    """Why the Triton kernels cannot be used here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def registered_devices(op: str) -> tuple[str, ...]:
    """Device types on which torch.ops.baton_kernels.<op> runs the Triton kernel."""
    return _registered.get(op, ())


def __getattr__(name: str) -> Any:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_module(name), name)


def _module(op: str) -> Any:
    reason = why_unavailable()
    if reason is not None:
        raise ImportError(
            f"baton_kernels.triton.{op}: {reason}: `pip install 'baton_kernels[triton]'`"
        )
    return importlib.import_module(f"{__name__}.{op}")


class _Package(types.ModuleType):
    """Importing a submodule makes it an attribute here; for an op's file that is its function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OPS and isinstance(value, types.ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def _lazy(op: str, function: str) -> Callable[..., Any]:
    """The op with its schema's results; imports triton when it is first called."""

    def run(*args, **kwargs):
        return getattr(_module(op), function)(*args, **kwargs)

    return run


def _register() -> None:
    """Gives every op that a kind of GPU has no kernel for the Triton kernel."""
    if why_unavailable() is not None:
        return
    for op in OPS:
        free = [
            device
            for device, key in _DEVICES.items()
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"baton_kernels::{op}", key)
        ]
        for overload in getattr(_library.ops, op).overloads():
            # Caches of eight bits: torch says that there is no kernel, and the op's Python function
            # says which there is.
            if overload.startswith("scaled"):
                continue
            name, function = (
                (op, "run") if overload == "default" else (f"{op}.{overload}", f"run_{overload}")
            )
            for device in free:
                _registrations.impl(name, _lazy(op, function), _DEVICES[device])
        _registered[op] = tuple(free)


_register()
