"""vLLM on the attention of `baton_kernels`, its pages read in place through its block table.

vLLM is not changed unless you choose this backend: with `attention_backend="CUSTOM"` (on its
command line `--attention-backend CUSTOM`), or with the environment variable `BATON_VLLM=override`,
which replaces vLLM's own CPU backend by `Override`. `BATON_VLLM=invariant` adds the layers of
`layers.py`, with which a request's bits do not depend on the batch. vLLM finds all of it through
the entry points of this distribution, in every process that it starts.

Importing this package loads neither vLLM nor torch; `Backend` and `Override` load them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import Backend, Override

__all__ = ["Backend", "Override"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .versions import require_vllm

    require_vllm()
    return getattr(importlib.import_module(".backend", __name__), name)
