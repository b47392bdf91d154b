"""Loads the compiled libraries, which register the ops with torch."""

import importlib
import importlib.util
import types
import warnings
from typing import Any

import torch

MINIMUM_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


if _torch_version() < MINIMUM_TORCH:
    raise ImportError(
        f"baton_kernels: torch must be >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} (the first with "
        f"the stable ABI the kernels use), got {torch.__version__}: `pip install -U torch`"
    )
try:
    # torch is imported above: its libraries must be in the process before ours.
    from baton_kernels import _C  # type: ignore[attr-defined]  # noqa: F401  # has no source
except ImportError as error:
    raise ImportError(
        f"baton_kernels: the compiled library does not load ({error}). From a source folder, build "
        "it with `pip install -e .`; from a wheel, install it again with "
        "`pip install --force-reinstall --no-deps baton_kernels`"
    ) from error


def _load_cuda() -> tuple[types.ModuleType | None, str | None]:
    """The CUDA library, or why it is not there. Without it the Triton kernels run on GPUs."""
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    if importlib.util.find_spec("baton_kernels._C_cuda") is None:
        return None, "built without the CUDA kernels (BATON_CUDA=1 builds them)"
    try:
        return importlib.import_module("baton_kernels._C_cuda"), None
    except ImportError as error:
        reason = f"the CUDA library does not load ({error})"
        warnings.warn(f"baton_kernels: {reason}; the Triton kernels take over", stacklevel=2)
        return None, reason


# The module, which says what it was compiled for, and why there is none: one of the two is None.
cuda, why_no_cuda = _load_cuda()

ops: Any = torch.ops.baton_kernels
