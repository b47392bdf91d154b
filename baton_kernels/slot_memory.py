"""The memory of a KV cache: tensors over all layers and slots, committed as they are written.

`[num_layers, num_slots, num_kv_heads, capacity, head_dim]`; `KVCache` has one for its keys and one
for its values, and with an eight-bit type one for the scales of each.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypedDict

import torch

# Address space for a large capacity may exceed memory and swap together. By default Linux rejects
# such a private mapping unless told that most of it will never be written. Python has the constant
# since 3.11.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@functools.cache
def huge_page_bytes() -> int:
    """Bytes of a transparent huge page of Linux, or of an ordinary page if there are none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text()
        return max(int(text), mmap.PAGESIZE)
    except (OSError, ValueError):
        return mmap.PAGESIZE


class SlotMemory:
    """A tensor whose slots can be returned to the operating system.

    On the CPU it lies in an anonymous private mapping, in which each slot of each layer begins on a
    separate page: no page belongs to two slots, so the pages of a free slot can be returned. The
    operating system commits a page when it is first written. On other devices it is a plain
    `torch.empty`.

    Args:
        sizes: num_layers, num_slots, num_kv_heads, capacity, head_dim; each at least 1.
        dtype: of the elements.
        device: where the tensor is stored.
        huge_pages: CPU: requests huge pages. Each slot of each layer then consists of whole huge
            pages, committed one by one; if Linux has none to spare it uses small ones.

    Attributes:
        tensor: of these sizes, uninitialized; the last three dimensions are contiguous.
        num_bytes: bytes of address space (CPU) or device memory.

    Raises:
        MemoryError: the address space could not be reserved.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        huge_pages: bool = False,
    ) -> None:
        num_layers, num_slots, num_kv_heads, capacity, head_dim = sizes
        self._sizes = sizes
        self._column_bytes = head_dim * dtype.itemsize
        self._lazy = device.type == "cpu"
        if not self._lazy:
            self.tensor = torch.empty(sizes, dtype=dtype, device=device)
            self.num_bytes = self.tensor.numel() * dtype.itemsize
            return
        self._page = huge_page_bytes() if huge_pages else mmap.PAGESIZE
        pages_per_slot = -(-num_kv_heads * capacity * self._column_bytes // self._page)
        self._slot_bytes = pages_per_slot * self._page
        self.num_bytes = num_layers * num_slots * self._slot_bytes
        # A mapping begins on a small page, so reserve room for beginning on a huge page.
        room = self._page - mmap.PAGESIZE
        try:
            self._mapping = mmap.mmap(
                -1,
                self.num_bytes + room,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE,
            )
        except (OSError, OverflowError) as error:
            raise MemoryError(
                f"KVCache: {self.num_bytes} bytes could not be reserved for "
                f"num_slots {num_slots} and capacity {capacity}; reduce one of them"
            ) from error
        self._advise(huge_pages)
        address = torch.frombuffer(self._mapping, dtype=torch.uint8).data_ptr()
        self._begin = -address % self._page
        # The tensor keeps the mapping alive, so a view may outlive the cache.
        flat = torch.frombuffer(
            self._mapping, dtype=dtype, offset=self._begin, count=self.num_bytes // dtype.itemsize
        )
        slot_stride = self._slot_bytes // dtype.itemsize
        strides = (num_slots * slot_stride, slot_stride, capacity * head_dim, head_dim, 1)
        self.tensor = flat.as_strided(sizes, strides)

    def release(self, slot: int) -> None:
        """Returns all pages of `slot` to the system, where possible; their content is lost."""
        if not self._lazy:
            return
        num_layers, num_slots = self._sizes[:2]
        for layer in range(num_layers):
            begin = self._begin + (layer * num_slots + slot) * self._slot_bytes
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, self._slot_bytes)

    def release_below(self, slot: int, column: int) -> None:
        """Returns the pages that hold only columns of `slot` below `column`, of any head and layer,
        where possible; the content of these columns is lost."""
        if not self._lazy:
            return
        num_layers, num_slots, num_kv_heads, capacity, _ = self._sizes
        for layer in range(num_layers):
            slot_begin = self._begin + (layer * num_slots + slot) * self._slot_bytes
            for head in range(num_kv_heads):
                # A head's first page may hold the last columns of the previous head.
                first = -(-head * capacity * self._column_bytes // self._page)
                last = (head * capacity + column) * self._column_bytes // self._page
                if last > first:
                    self._mapping.madvise(
                        mmap.MADV_DONTNEED,
                        slot_begin + first * self._page,
                        (last - first) * self._page,
                    )

    def committed(self, columns: Iterable[tuple[int, int]]) -> int:
        """Bytes of the pages that hold columns `[low, high)` of every head and layer of some slots.

        Args:
            columns: low and high for each of these slots, in any order.
        """
        if not self._lazy:
            return self.num_bytes
        num_layers, _, num_kv_heads, capacity, _ = self._sizes
        pages = 0
        for low, high in columns:
            if low == high:
                continue
            last = -1
            for head in range(num_kv_heads):
                # Neighboring heads share a page if a head's columns are not whole pages.
                first = max((head * capacity + low) * self._column_bytes // self._page, last + 1)
                last = ((head * capacity + high) * self._column_bytes - 1) // self._page
                pages += last + 1 - first
        return pages * num_layers * self._page

    def _advise(self, huge_pages: bool) -> None:
        """Requests small or huge pages explicitly (madvise), independent of the system's default.

        By default small pages: with huge pages the first column written commits 2 MiB per layer and
        head, which spans several heads where `capacity * head_dim` is small, and thousands of
        columns where it is large. Huge pages save address translation: a few percent of the time
        that attention takes (docs/performance.md).
        """
        # Linux kernels built without transparent huge pages reject the advice and have none to use.
        with contextlib.suppress(AttributeError, OSError):
            self._mapping.madvise(mmap.MADV_HUGEPAGE if huge_pages else mmap.MADV_NOHUGEPAGE)


class Scales(TypedDict, total=False):
    """Keyword arguments of the ops; empty for caches of floats."""

    key_scale: torch.Tensor
    value_scale: torch.Tensor


class KVMemory:
    """The memory of a `KVCache`: keys, values and, for eight-bit types, their scales.

    Args:
        sizes: as for `SlotMemory`.
        dtype: of keys and values.
        device: where they are stored.
        huge_pages: see `SlotMemory`; for keys and values only, because a slot's scales are small.

    Attributes:
        keys, values: tensors of these sizes.
        key_scales, value_scales: float32 `[num_layers, num_slots, num_kv_heads, capacity]` for
            eight-bit types, else None.
        num_bytes: bytes of all of them.
        head_bytes: bytes of the key and the value of one token and head, with their scales.

    Raises:
        MemoryError: the address space could not be reserved.
    """

    def __init__(
        self,
        sizes: tuple[int, int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        *,
        huge_pages: bool = False,
    ) -> None:
        self._memories = [SlotMemory(sizes, dtype, device, huge_pages=huge_pages) for _ in range(2)]
        self.key_scales: torch.Tensor | None = None
        self.value_scales: torch.Tensor | None = None
        if dtype.itemsize == 1:
            scales = [SlotMemory((*sizes[:-1], 1), torch.float32, device) for _ in range(2)]
            self.key_scales, self.value_scales = (memory.tensor[..., 0] for memory in scales)
            self._memories += scales
        self.keys, self.values = (memory.tensor for memory in self._memories[:2])
        self.num_bytes = sum(memory.num_bytes for memory in self._memories)
        self.head_bytes = sum(
            memory.tensor.shape[-1] * memory.tensor.itemsize for memory in self._memories
        )

    def row(self, slot: int, columns: slice) -> tuple[torch.Tensor, ...]:
        """Views of these columns of a slot, in all tensors."""
        return tuple(memory.tensor[:, slot, :, columns] for memory in self._memories)

    def copy_row(self, slot: int, columns: slice, source: KVMemory) -> None:
        """Copies these columns of a slot from the same place in another memory."""
        for own, other in zip(self.row(slot, columns), source.row(slot, columns), strict=True):
            own.copy_(other)

    def release(self, slot: int) -> None:
        """See `SlotMemory.release`."""
        for memory in self._memories:
            memory.release(slot)

    def release_below(self, slot: int, column: int) -> None:
        """See `SlotMemory.release_below`."""
        for memory in self._memories:
            memory.release_below(slot, column)

    def committed(self, columns: Sequence[tuple[int, int]]) -> int:
        """See `SlotMemory.committed`."""
        return sum(memory.committed(columns) for memory in self._memories)
