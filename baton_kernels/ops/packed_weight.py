"""Weights of `linear` packed once, in the order in which a CPU reads them."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import NamedTuple

import torch

from baton_kernels.ops.checks import Checker
from baton_kernels.ops.linear_packed import pack_into, panel_shape, unpack
from baton_kernels.slot_memory import huge_page_bytes

# Panels begin on a small page: a stream of reads then crosses as few as it can.
_ALIGNMENT = mmap.PAGESIZE


class PackedWeight(NamedTuple):
    """A weight as `linear` takes it besides a tensor; made by `pack_linear`.

    Attributes:
        panels: on the CPU `[ceil(out_features / 48), in_features, 48]`, in bfloat16 `[ceil(
            out_features / 48), ceil(in_features / 2), 48, 2]`: for 48 outputs at a time all that
            they multiply, outputs side by side. On other devices the weight itself, whose kernels
            read it as it is.
        out_features, in_features: int, the weight's sizes.
    """

    panels: torch.Tensor
    out_features: int
    in_features: int

    @property
    def is_packed(self) -> bool:
        """Whether `panels` are panels, and not the weight itself."""
        # A weight has two dimensions.
        return self.panels.dim() > 2

    def unpack(self) -> torch.Tensor:
        """The weight, `[out_features, in_features]`, with the bits that were packed."""
        if not self.is_packed:
            return self.panels
        return unpack(self.panels, self.out_features, self.in_features)

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, as an embedding looks them up.

        Args:
            outputs: int32 or int64 `[rows]`, each below `out_features`.

        Returns:
            `[rows, in_features]`, the bits that were packed.

        Raises:
            ValueError: An index is not of a row.
        """
        if not self.is_packed:
            return self.panels[outputs]
        return unpack(self.panels, self.out_features, self.in_features, outputs.int())


def pack_linear(weight: torch.Tensor, *, memory: PanelMemory | None = None) -> PackedWeight:
    """Packs a weight for `linear`: the same elements in the order in which a CPU reads them.

    On the CPU the panels are a copy, in huge pages where the system has them. On other devices
    nothing is copied: the result holds the weight itself, and `linear` does what it does with it.

    Args:
        weight: `[out_features, in_features]`, float32, float16 or bfloat16, last dimension
            contiguous.
        memory: where the panels of many weights lie side by side; by default in memory of their
            own.

    Returns:
        The `PackedWeight`, which `linear` takes in place of `weight`.

    Raises:
        ValueError: The shape or a stride does not fit, or memory has no room left.
        TypeError: The dtype is not supported.

    Source: the packed operands of BLAS libraries (BLIS, oneDNN), kept.
    """
    check = Checker("pack_linear")
    check.floating("weight", weight)
    check.dims("weight", weight, 2)
    check.last_contiguous("weight", weight)
    out_features, in_features = weight.shape
    if weight.device.type != "cpu":
        return PackedWeight(weight, out_features, in_features)
    shape = panel_shape(weight.dtype, out_features, in_features)
    if memory is None:
        memory = PanelMemory(panel_bytes(weight))
    panels = memory.take(shape, weight.dtype)
    pack_into(weight, panels)
    return PackedWeight(panels, out_features, in_features)


def panel_bytes(weight: torch.Tensor) -> int:
    """Bytes that the panels of a weight take of a `PanelMemory`."""
    size = math.prod(panel_shape(weight.dtype, *weight.shape)) * weight.dtype.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class PanelMemory:
    """Memory for the panels of many weights, in huge pages where the system has them.

    Pages are committed as they are written. Tensors of it keep it alive.

    Args:
        num_bytes: the sum of `panel_bytes` of the weights.

    Raises:
        MemoryError: the address space could not be reserved.
    """

    def __init__(self, num_bytes: int) -> None:
        # A mapping begins on a small page: room to begin on a huge one.
        huge = huge_page_bytes()
        try:
            self._mapping = mmap.mmap(
                -1, max(num_bytes, 1) + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"pack_linear: {num_bytes} bytes for panels could not be reserved"
            ) from error
        # Less than a huge page is not worth one. Kernels built without transparent huge pages
        # refuse the advice.
        if num_bytes >= huge:
            with contextlib.suppress(AttributeError, OSError):
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._base = address
        self._next = -address % huge
        self._end = self._next + num_bytes

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous, uninitialized tensor.

        Args:
            shape: its sizes.
            dtype: of its elements.

        Raises:
            ValueError: There is no room left for it.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._next + size > self._end:
            raise ValueError(
                f"pack_linear: memory must be large enough for {size} bytes more, got "
                f"{self._end - self._next}"
            )
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._next)
        self._next += size
        return tensor.view(shape)

    def release(self, tensor: torch.Tensor) -> None:
        """Gives the pages of a tensor of this memory back to the system, where they can be; its
        content is lost."""
        if tensor.numel() == 0:
            return
        begin = tensor.data_ptr() - self._base
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with contextlib.suppress(AttributeError, OSError):
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, size)
