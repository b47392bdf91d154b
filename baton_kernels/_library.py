"""Loads the compiled library, which registers the ops with torch."""

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
    from baton_kernels import _C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"baton_kernels: the compiled library does not load ({error}). From a source folder, build "
        "it with `pip install -e .`; from a wheel, install it again with "
        "`pip install --force-reinstall --no-deps baton_kernels`"
    ) from error

ops = torch.ops.baton_kernels
