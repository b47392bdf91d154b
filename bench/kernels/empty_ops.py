"""The least cost of a call: ops of the same schemas that do nothing (`empty_ops.cpp`)."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType

import torch

import baton_kernels

from .limits import compiled

_library = torch.library.Library("baton_empty", "DEF")


@functools.cache
def empty_ops() -> ModuleType:
    """`torch.ops.baton_empty`, compiled on first use."""
    for op in baton_kernels.ops.__all__:
        schema = getattr(torch.ops.baton_kernels, op).default._schema
        _library.define(str(schema).split("::")[1])
    torch_folder = Path(torch.__file__).parent
    path = compiled(
        Path(__file__).with_name("empty_ops.cpp"),
        ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", f"{torch_folder}/include"],
        [f"-L{torch_folder}/lib", "-ltorch_cpu"],
    )
    torch.ops.load_library(path)
    return torch.ops.baton_empty
