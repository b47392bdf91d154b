"""Llama on the kernels of `baton_kernels`: loading, patching, the packed forward.

Names are imported when they are first used: `PackedBatch` needs no transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forward import PatchedLlama, patch_llama
    from .handle import ModelHandle
    from .load import ModelLoadError, load_model
    from .packed_batch import PackedBatch

# Public name -> the module that defines it.
_EXPORTS = {
    "ModelHandle": ".handle",
    "ModelLoadError": ".load",
    "PackedBatch": ".packed_batch",
    "PatchedLlama": ".forward",
    "load_model": ".load",
    "patch_llama": ".forward",
}

__all__ = [
    "ModelHandle",
    "ModelLoadError",
    "PackedBatch",
    "PatchedLlama",
    "load_model",
    "patch_llama",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
