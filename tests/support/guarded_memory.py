"""Memory between guard pages, and tensors placed directly next to them.

Reading or writing a byte past a guard ends the process. A second copy of all memory tells which
bytes a call was allowed to write.
"""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import torch
from hostile_calls import Described

PAGE = mmap.PAGESIZE
REGION_BYTES = 64 * PAGE
_UNITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_libc = ctypes.CDLL(None, use_errno=True)


class Region:
    """Some pages between two guards."""

    def __init__(self, num_bytes: int = REGION_BYTES):
        self._memory = mmap.mmap(-1, num_bytes + 2 * PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for guard in (begin, begin + PAGE + num_bytes):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(PAGE), 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")
        self.bytes = np.frombuffer(self._memory, np.uint8, num_bytes, PAGE)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, count=num_bytes, offset=PAGE)
        self.flat = {dtype: flat.view(dtype) for dtype in _ALL}
        self.may_change = torch.zeros(num_bytes, dtype=torch.uint8)
        self._units = {size: self.may_change.view(dtype) for size, dtype in _UNITS.items()}

    def allow(self, tensor: torch.Tensor) -> None:
        """Allow the elements of this tensor to be written."""
        units = self._units[tensor.element_size()]
        units.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(-1)


_ALL = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.int64,
    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn,
)  # fmt: skip


def strides_of(tensor: Described, pick: int) -> list[int] | None:
    """Strides in elements; None if there are none of that layout."""
    shape, order = tensor.shape, list(range(len(tensor.shape)))
    if tensor.layout == "permuted" and len(order) > 2:
        a, b = pick % (len(order) - 1), (pick // 7) % (len(order) - 1)
        order[a], order[b] = order[b], order[a]
    strides, step = [0] * len(shape), 1
    for place, dimension in enumerate(reversed(order)):
        strides[dimension] = step
        step *= max(shape[dimension], 1)
        if tensor.layout == "gaps" and place == 0:
            step += 8
    if shape and tensor.layout == "every_second":
        strides = [2 * stride for stride in strides]
    if shape and tensor.layout == "expanded":
        strides[pick % len(shape)] = 0
    if shape and tensor.layout == "overlapping":
        place = pick % len(shape)
        strides[place] = max(strides[place] - 1 - pick % 3, 0)
    return strides


def extent_bytes(shape: list[int], strides: list[int], item: int) -> int:
    """Bytes from the first to the last element; 0 without elements."""
    if 0 in shape:
        return 0
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    return (last + 1) * item
