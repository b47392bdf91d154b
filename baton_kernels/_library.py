"""Loads the compiled libraries, which register the ops with torch."""

import warnings
from pathlib import Path

import torch

from baton_kernels import torch_ops

MINIMUM_TORCH = (2, 10)


def _torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


if _torch_version() < MINIMUM_TORCH:
    raise ImportError(
        f"baton_kernels: torch must be >= {MINIMUM_TORCH[0]}.{MINIMUM_TORCH[1]} (the first with "
        f"the stable ABI the kernels use), got {torch.__version__}: `pip install -U torch`"
    )


def _file(name: str) -> Path:
    return Path(__file__).with_name(f"lib{name}.so")


def _load(library: Path) -> Path:
    """Loads and returns it, or raises OSError with the loader's reason.

    The libraries are not Python modules, so that one file serves every Python. torch is imported
    above: its libraries must be in the process before ours.
    """
    torch.ops.load_library(str(library))
    return library


try:
    cpu = _load(_file("baton_kernels"))
except OSError as error:
    raise ImportError(
        f"baton_kernels: the compiled library does not load ({error}). From a source folder, build "
        "it with `pip install -e .`; from a wheel, install it again with "
        "`pip install --force-reinstall --no-deps baton_kernels`"
    ) from error


def _load_cuda() -> tuple[Path | None, str | None]:
    """The CUDA library, or why it is missing. Without it the Triton kernels run on GPUs."""
    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    library = _file("baton_kernels_cuda")
    if not library.exists():
        return None, "built without the CUDA kernels (BATON_CUDA=1 builds them)"
    try:
        return _load(library), None
    except OSError as error:
        reason = f"the CUDA library does not load ({error})"
        warnings.warn(f"baton_kernels: {reason}; the Triton kernels take over", stacklevel=2)
        return None, reason


# The file of the CUDA library, or the reason why there is none.
cuda, why_no_cuda = _load_cuda()

ops = torch_ops.ops
