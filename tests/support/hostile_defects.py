"""Defects that the judge of hostile calls must find: versions of insert_kv, each wrong in one
way."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import torch
from guarded_memory import REGION_BYTES

# Defect -> what the judge reports.
DEFECTS = {
    "writes when it refuses": "it was refused",
    "writes next to its tensor": "outside of what is written",
    "depends on where tensors lie": "into a copy",
    "touches a guard page": "ended the process: SIGSEGV",
    "ends the process": "ended the process: exit status 3",
}


class Broken:
    """Stands for torch.ops.baton_kernels.insert_kv.default."""

    def __init__(self, defect: str):
        self._native = torch.ops.baton_kernels.insert_kv.default
        self._schema = self._native._schema
        self.defect = defect

    def __call__(self, **arguments: Any) -> None:
        cache = arguments["key_cache"]
        if (
            not isinstance(cache, torch.Tensor)
            or cache.layout != torch.strided
            or cache.device.type != "cpu"
            or cache.untyped_storage().nbytes() != REGION_BYTES
            or cache.storage_offset() == 0
            or cache.numel() == 0
        ):
            return self._native(**arguments)
        begin = cache.storage_offset()
        whole = cache.new_empty(0).set_(
            cache.untyped_storage(), 0, (REGION_BYTES // cache.element_size(),), (1,)
        )
        if self.defect == "ends the process":
            os._exit(3)
        if self.defect == "touches a guard page":
            ctypes.string_at(whole.data_ptr() + REGION_BYTES, 1)
        if self.defect == "writes when it refuses":
            whole[begin] = 77
            raise ValueError("refused")
        self._native(**arguments)
        if self.defect == "writes next to its tensor":
            whole[begin - 1] = 77
        elif self.defect == "depends on where tensors lie":
            whole[begin] = 77
        return None


@contextlib.contextmanager
def planted(defect: str) -> Iterator[None]:
    """Within the block insert_kv has this defect, in this process and its children."""
    whole = torch.ops.baton_kernels.insert_kv
    torch.ops.baton_kernels.insert_kv = type("Packet", (), {"default": Broken(defect)})
    try:
        yield
    finally:
        torch.ops.baton_kernels.insert_kv = whole
