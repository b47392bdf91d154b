"""The memory of a KV cache: one tensor over all layers and slots, committed as it is written.

`[num_layers, num_slots, num_kv_heads, capacity, head_dim]`; `KVCache` has one for its keys and
one for its values.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterable

import torch


class SlotMemory:
    """A tensor whose slots can be given back to the operating system.

    On the CPU it lies in an anonymous private mapping, in which each slot of each layer begins on a
    page of its own: no page belongs to two slots, so those of a free slot can be given back. The
    kernel commits a page when it is first written. On other devices it is a plain `torch.empty`.

    Args:
        sizes: num_layers, num_slots, num_kv_heads, capacity, head_dim; each at least 1.
        dtype: of the elements.
        device: where the tensor lives.

    Attributes:
        tensor: of these sizes, uninitialized; the last three dimensions are contiguous.
        num_bytes: bytes of address space (CPU) or device memory.

    Raises:
        MemoryError: the address space could not be reserved.
    """

    def __init__(
        self, sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        num_layers, num_slots, num_kv_heads, capacity, head_dim = sizes
        self._sizes = sizes
        self._column_bytes = head_dim * dtype.itemsize
        self._lazy = device.type == "cpu"
        if not self._lazy:
            self.tensor = torch.empty(sizes, dtype=dtype, device=device)
            self.num_bytes = self.tensor.numel() * dtype.itemsize
            return
        pages_per_slot = -(-num_kv_heads * capacity * self._column_bytes // mmap.PAGESIZE)
        self._slot_bytes = pages_per_slot * mmap.PAGESIZE
        self.num_bytes = num_layers * num_slots * self._slot_bytes
        try:
            self._mapping = mmap.mmap(
                -1, self.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            )
        except (OSError, OverflowError) as error:
            raise MemoryError(f"KVCache: {self.num_bytes} bytes could not be reserved") from error
        self._refuse_huge_pages()
        # The tensor keeps the mapping alive, so a view may outlive the cache.
        flat = torch.frombuffer(self._mapping, dtype=dtype)
        slot_stride = self._slot_bytes // dtype.itemsize
        strides = (num_slots * slot_stride, slot_stride, capacity * head_dim, head_dim, 1)
        self.tensor = flat.as_strided(sizes, strides)

    def release(self, slot: int) -> None:
        """Gives back all pages of `slot`, whose content is lost, where they can be."""
        if not self._lazy:
            return
        num_layers, num_slots = self._sizes[:2]
        for layer in range(num_layers):
            begin = (layer * num_slots + slot) * self._slot_bytes
            self._mapping.madvise(mmap.MADV_DONTNEED, begin, self._slot_bytes)

    def committed(self, columns: Iterable[tuple[int, int]]) -> int:
        """Bytes of the pages below columns `[low, high)` of every head and layer of some slots.

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
                # Neighboring heads share a page where a head's columns are not whole pages.
                first = max((head * capacity + low) * self._column_bytes // mmap.PAGESIZE, last + 1)
                last = ((head * capacity + high) * self._column_bytes - 1) // mmap.PAGESIZE
                pages += last + 1 - first
        return pages * num_layers * mmap.PAGESIZE

    def _refuse_huge_pages(self) -> None:
        """Keeps the kernel to small pages, even where transparent huge pages are on for everybody.

        With huge pages the first column written would commit 2 MiB per layer and head: the stripes
        of several heads, or even slots, where `capacity * head_dim` is small, and thousands of
        columns where it is large. What they spare is address translation, and a kernel that streams
        through long rows feels little of it: about a tenth of its time at most.
        """
        # Kernels built without transparent huge pages refuse the advice: nothing to prevent there.
        with contextlib.suppress(AttributeError, OSError):
            self._mapping.madvise(mmap.MADV_NOHUGEPAGE)
