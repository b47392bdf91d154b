"""Models and engines on top of `baton_kernels`: the Llama patch, the relay, its policies, the
command line.

Importing this package is cheap: torch, transformers and the kernels are loaded when a name is first
used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .huggingface import unpatch
    from .llama import (
        ModelLoadError,
        PackedBatch,
        PatchedLlama,
        load_model,
        patch_llama,
    )
    from .relay import Query, Relay

# Public name -> the module that defines it.
_EXPORTS = {
    "ModelLoadError": ".llama",
    "PackedBatch": ".llama",
    "PatchedLlama": ".llama",
    "Query": ".relay",
    "Relay": ".relay",
    "load_model": ".llama",
    "patch_llama": ".llama",
    "unpatch": ".huggingface",
}

__all__ = [
    "ModelLoadError",
    "PackedBatch",
    "PatchedLlama",
    "Query",
    "Relay",
    "load_model",
    "patch_llama",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
