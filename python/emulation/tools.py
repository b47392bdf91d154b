"""Where the CUDA compiler and its helpers are: on the machine, or in PyPI's nvidia packages."""

from __future__ import annotations

import functools
import re
import shutil
import site
import sys
from pathlib import Path

INSTALL = (
    "nvcc 13 is needed: install CUDA, or `pip install nvidia-cuda-nvcc==13.0.* "
    "nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-runtime==13.0.* "
    "nvidia-cuda-cccl==13.0.*`"
)


def _packages() -> list[Path]:
    folders = [*site.getsitepackages(), *sys.path]
    return [path for folder in folders for path in sorted(Path(folder or ".").glob("nvidia/*"))]


@functools.cache
def tool(name: str) -> str | None:
    """Path of nvcc, cuobjdump or nvdisasm, or None."""
    found = shutil.which(name)
    if found:
        return found
    candidates = [Path("/usr/local/cuda/bin"), *(path / "bin" for path in _packages())]
    return next((str(path / name) for path in candidates if (path / name).is_file()), None)


@functools.cache
def cuda_include() -> Path:
    """The folder of cuda_fp16.h, which the host compiler reads too."""
    nvcc = tool("nvcc")
    near = [Path(nvcc).resolve().parent.parent / "include"] if nvcc else []
    for folder in [*near, Path("/usr/local/cuda/include"), *(p / "include" for p in _packages())]:
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise FileNotFoundError(f"cuda_fp16.h is nowhere to be found: {INSTALL}")


def with_includes(source: Path, folders: tuple[Path, ...]) -> list[Path]:
    """A source and the files of the repository that it includes, directly or not."""
    found, waiting = set(), [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(r'#\s*include\s*"([^"]+)"', path.read_text()):
            waiting += [folder / name for folder in folders if (folder / name).is_file()]
    return sorted(found)
