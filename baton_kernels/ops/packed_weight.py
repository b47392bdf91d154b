"""Weights of `linear` that are packed once, in the order in which a CPU reads them."""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import NamedTuple

import torch

from baton_kernels.ops.checks import Checker, dtype_name
from baton_kernels.ops.linear_packed import pack_into, panel_shape, quantize, unpack
from baton_kernels.slot_memory import huge_page_bytes

# Panels begin on a small page, so that a stream of reads crosses as few pages as possible.
_ALIGNMENT = mmap.PAGESIZE


class PackedWeight(NamedTuple):
    """A packed weight, which `linear` takes instead of a tensor; made by `pack_linear`.

    Attributes:
        panels: on the CPU `[ceil(out_features / 48), in_features, 48]`, in bfloat16 `[ceil(
            out_features / 48), ceil(in_features / 2), 48, 2]`, in int8 `[ceil(out_features / 48),
            ceil(in_features / 4), 48, 4]`: the weights of 48 outputs at a time, with the outputs
            side by side. On other devices the unpacked weight, which their kernels use directly.
        out_features, in_features: int, the weight's sizes.
        scales: float32 `[out_features]` if the weight was rounded to int8, else None.
    """

    panels: torch.Tensor
    out_features: int
    in_features: int
    scales: torch.Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether `panels` are panels rather than the unpacked weight."""
        # A weight has two dimensions.
        return self.panels.dim() > 2

    def unpack(self) -> torch.Tensor:
        """The weight, `[out_features, in_features]`, with the bits that were packed; if it was
        rounded to int8, `int8 * scale` as float32."""
        if not self.is_packed:
            return self.panels
        weight = unpack(self.panels, self.out_features, self.in_features)
        return weight if self.scales is None else weight * self.scales[:, None]

    def rows(self, outputs: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, as an embedding looks them up.

        Args:
            outputs: int32 or int64 `[rows]`, each below `out_features`.

        Returns:
            `[rows, in_features]`, with the values of `unpack`.

        Raises:
            ValueError: An index is out of range.
        """
        if not self.is_packed:
            return self.panels[outputs]
        rows = unpack(self.panels, self.out_features, self.in_features, outputs.int())
        return rows if self.scales is None else rows * self.scales[outputs, None]


def pack_linear(
    weight: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    memory: PanelMemory | None = None,
) -> PackedWeight:
    """Packs a weight for `linear`: the same elements in the order in which a CPU reads them.

    On the CPU the panels are a copy, in huge pages if the system has them. On other devices nothing
    is copied: the result holds the weight itself, and `linear` uses it as such.

    With `dtype=torch.int8` each output's row is rounded to `round(row / scale)`, from -127 to 127,
    ties to even, where `scale` is its largest magnitude / 127: half of bfloat16's bytes. `linear`
    rounds x in the same way, with a scale per 64 elements of a row. An output whose row holds NaN
    or infinity gives NaN; one whose largest magnitude is below 127 / 3.4e38 counts as 0.

    Args:
        weight: `[out_features, in_features]`, float32, float16 or bfloat16, last dimension
            contiguous.
        dtype: of the panels: by default the weight's own, or torch.int8, on the CPU.
        memory: shared memory for the panels of many weights; by default each weight has separate
            memory.

    Returns:
        The `PackedWeight`, which `linear` takes in place of `weight`.

    Raises:
        ValueError: The shape or a stride does not fit, or memory has no room left.
        TypeError: A dtype is not supported.
        NotImplementedError: int8 on another device than the CPU.

    Source: packed operands as in BLAS libraries (BLIS, oneDNN), kept between calls; int8 with
    scales per block of elements as in ggml's Q8_0, here for x only.
    """
    check = Checker("pack_linear")
    check.floating("weight", weight)
    check.dims("weight", weight, 2)
    check.last_contiguous("weight", weight)
    out_features, in_features = weight.shape
    kind = _panel_dtype(check, weight, dtype)
    if weight.device.type != "cpu":
        if kind != weight.dtype:
            check.fail("weight", "on the cpu for int8", str(weight.device), NotImplementedError)
        return PackedWeight(weight, out_features, in_features)
    scales = None
    if memory is None:
        memory = PanelMemory(panel_bytes(weight, dtype=kind))
    panels = memory.take(panel_shape(kind, out_features, in_features), kind)
    if kind != weight.dtype:
        weight, scales = quantize(weight)
    pack_into(weight, panels)
    return PackedWeight(panels, out_features, in_features, scales)


def _panel_dtype(check: Checker, weight: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype not in (None, weight.dtype, torch.int8):
        expected = f"{dtype_name(weight.dtype)} as weight, or int8"
        actual = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        check.fail("dtype", expected, actual, TypeError)
    return weight.dtype if dtype is None else dtype


def panel_bytes(weight: torch.Tensor, *, dtype: torch.dtype | None = None) -> int:
    """Bytes that the panels of a weight take in a `PanelMemory`.

    Args:
        weight: see `pack_linear`.
        dtype: see `pack_linear`.
    """
    kind = weight.dtype if dtype is None else dtype
    size = math.prod(panel_shape(kind, *weight.shape)) * kind.itemsize
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class PanelMemory:
    """Memory for the panels of many weights, in huge pages where the system has them.

    Pages are committed as they are written. Tensors in it keep it alive.

    Args:
        num_bytes: the sum of `panel_bytes` of the weights.

    Raises:
        MemoryError: the address space could not be reserved.
    """

    def __init__(self, num_bytes: int) -> None:
        # A mapping begins on a small page, so reserve room for beginning on a huge page.
        huge = huge_page_bytes()
        try:
            self._mapping = mmap.mmap(
                -1, max(num_bytes, 1) + huge, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"pack_linear: {num_bytes} bytes for panels could not be reserved"
            ) from error
        # Smaller amounts would waste a huge page. Linux kernels built without transparent huge
        # pages reject the advice.
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
            ValueError: There is not enough room left.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype, device="cpu")
        size = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        if self._next + size > self._end:
            raise ValueError(
                f"pack_linear: memory must have {size} free bytes, got {self._end - self._next}"
            )
        tensor = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=self._next)
        self._next += size
        return tensor.view(shape)

    def release(self, tensor: torch.Tensor) -> None:
        """Returns the pages of a tensor in this memory to the system, as far as possible; its
        content is lost."""
        if tensor.numel() == 0:
            return
        begin = tensor.data_ptr() - self._base
        size = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        with contextlib.suppress(AttributeError, OSError):
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, size)
