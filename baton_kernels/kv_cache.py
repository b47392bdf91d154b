"""A dense KV cache for all layers of a model; its rows may come and go between two decode steps.

Tensors, and the `BatchShape` that says which of their columns are valid, change together: each
method first computes the new shape on a copy, then lets the ops write, then adopts the copy. A call
that raises leaves both as they were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from baton_kernels.batch_shape import BatchShape, Moves, checked_int
from baton_kernels.cache_memory import CacheMemory
from baton_kernels.ops.checks import EIGHT_BITS, FLOATS, Checker, dtype_name
from baton_kernels.ops.extract_kv import extract_kv
from baton_kernels.ops.insert_kv import insert_kv
from baton_kernels.ops.move_kv import move_kv
from baton_kernels.slot_memory import Scales


class KVCache(CacheMemory):
    """Keys and values of all layers for a running batch, and its shape.

    Token t of the query in `slot` is `keys[:, slot, :, shape.start(slot) + t]`, likewise
    `values`. Every other column is padding, which nothing here clears and nothing may read.

    On the CPU the cache reserves address space and commits memory page by page as columns are
    written, so a large capacity costs nothing until it is used; `release` returns the pages of free
    slots. On other devices it is allocated whole.

    `keys`, `values` and `shape` are for reading (the ops write columns of rows in use through
    `layer`); rows change only through the methods. `resize` replaces `keys` and `values`, so views
    of them must be taken again afterwards.

    Args:
        num_layers: int, at least 1.
        num_slots: int, at least 1; rows the cache can hold.
        num_kv_heads: int, at least 1.
        capacity: int, at least 1; columns of a slot.
        head_dim: int, a multiple of 8 from 16 to 256.
        dtype: float32, float16 or bfloat16; on the CPU also int8 or float8_e4m3fn, with a float32
            scale per token and head (`insert_kv` has the formula).
        device: where keys and values are stored.
        aligned: bool; whether all rows end in the same column, see `BatchShape`.
        huge_pages: bool; CPU: requests huge pages from Linux, with which attention is a few percent
            faster. Each slot of each layer then consists of whole huge pages (mostly 2 MiB), in
            which memory is committed, so this suits slots that are large and will be filled. No
            effect elsewhere.

    Attributes:
        keys: `[num_layers, num_slots, num_kv_heads, capacity, head_dim]`, last dimension
            contiguous.
        values: the same.
        key_scales: `[num_layers, num_slots, num_kv_heads, capacity]` for eight-bit types, else
            None.
        value_scales: the same.

    Raises:
        TypeError: a size is not an integer, or dtype is not one of these.
        ValueError: a size is below 1.
        NotImplementedError: the ops do not support head_dim, or eight-bit types on this device.
        MemoryError: the address space could not be reserved.

    Undefined: the content of padding, whether new or left behind by a query.

    Source: BATON, section on embedding prefilled keys and values into the KV cache of the running
    batch.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        aligned: bool = False,
        huge_pages: bool = False,
    ) -> None:
        self._num_layers = checked_int("KVCache", "num_layers", num_layers, 1)
        self._num_kv_heads = checked_int("KVCache", "num_kv_heads", num_kv_heads, 1)
        self._head_dim = checked_int("KVCache", "head_dim", head_dim, 1)
        check = Checker("KVCache")
        if dtype not in (*FLOATS, *EIGHT_BITS):
            expected = "float32, float16, bfloat16, int8 or float8_e4m3fn"
            check.fail("dtype", expected, dtype_name(dtype), TypeError)
        # Runs the ops' own checks of such a cache before memory is requested.
        column = torch.empty(1, 1, 1, 1, self._head_dim, dtype=torch.float32, device="meta")
        check.caches(column, column, with_layers=True, written=True)
        self._dtype = dtype
        self._device = torch.device(device)
        if dtype in EIGHT_BITS and self._device.type != "cpu":
            check.fail("device", f"cpu with {dtype_name(dtype)}", device, NotImplementedError)
        self._huge_pages = huge_pages
        self._shape = BatchShape(num_slots, capacity, aligned=aligned)
        self._memory = self._new_memory(self._shape.num_slots)
        # With its index: "cuda" by itself would follow the current device, the tensors do not.
        self._device = self.keys.device
        # Per slot, the columns [low, high) that may have been written.
        self._touched = [(0, 0)] * self._shape.num_slots
        self._bytes_moved = 0

    @property
    def shape(self) -> BatchShape:
        """The shape of the batch; always the same object."""
        return self._shape

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one layer: key_cache and value_cache for the ops.

        `[num_slots, num_kv_heads, capacity, head_dim]` each.

        Args:
            index: int, 0 to num_layers - 1.

        Raises:
            ValueError: index is out of range.
        """
        index = checked_int("KVCache.layer", "index", index, 0, self._num_layers - 1)
        return self.keys[index], self.values[index]

    def scales(self, index: int | None = None) -> Scales:
        """The arguments key_scale and value_scale of the ops for the layer's caches.

        Args:
            index: int, 0 to num_layers - 1; None for all layers, with `keys` and `values`.

        Returns:
            Keyword arguments: both scales, `[num_slots, num_kv_heads, capacity]`, for all layers
            with a leading num_layers; empty unless the cache has an eight-bit type.

        Raises:
            ValueError: index is out of range.
        """
        key, value = self.key_scales, self.value_scales
        if key is None or value is None:
            return {}
        if index is not None:
            index = checked_int("KVCache.scales", "index", index, 0, self._num_layers - 1)
            key, value = key[index], value[index]
        return {"key_scale": key, "value_scale": value}

    def allocate(self, length: int, slot: int | None = None) -> int:
        """Takes a free slot for `length` tokens, whose keys and values the caller must write.

        Args:
            length: int, 0 to capacity, in tokens.
            slot: int, the free slot to take; None takes the lowest.

        Returns:
            The slot; its columns are `[shape.start(slot), shape.end(slot))`.

        Raises:
            ValueError: length or slot is out of range, the slot is in use, or none is free.

        Undefined: the content of the row until it is written.
        """
        planned = self._shape.copy()
        slot, moves = planned.allocate(length, slot)
        self._move(moves)
        self._commit(planned)
        return slot

    def extend(self, slots: Iterable[int], counts: Iterable[int] | None = None) -> None:
        """Adds tokens at the end of rows; the caller must write their keys and values
        (`append_kv`).

        The new tokens of a row are its columns `[end - counts[i], end)` after the call.

        Args:
            slots: ints, distinct, in use. Aligned: every row that has tokens.
            counts: ints, at least 0, in tokens, one per slot, equal ones if aligned; None means 1
                each.

        Raises:
            ValueError: see `BatchShape.extend`.

        Undefined: the content of the new columns until they are written.
        """
        planned = self._shape.copy()
        moves = planned.extend(slots, counts)
        self._move(moves)
        self._commit(planned)

    def insert(self, key: torch.Tensor, value: torch.Tensor, slot: int | None = None) -> int:
        """Takes a free slot for a prefilled query and writes it, all layers at once.

        `keys[l, slot, h, shape.start(slot) + t] = key[l, t, h]`, values likewise.

        Args:
            key: `[num_layers, tokens, num_kv_heads, head_dim]`, the cache's dtype and device,
                last dimension contiguous. For an eight-bit cache float32, float16 or bfloat16, or
                tokens as `extract` returns them.
            value: the same.
            slot: int, the free slot to take; None takes the lowest.

        Returns:
            The slot.

        Raises:
            TypeError: key or value has another dtype than the cache.
            ValueError: key or value has another shape, stride or device than stated, the tokens
                exceed the capacity, the slot is out of range or in use, or none is free.

        Source: BATON, shaping and embedding of a new query.
        """
        check = Checker("KVCache.insert")
        check.tokens("key", key, self.keys)
        check.tokens("value", value, self.keys)
        check.dtype_as("value", value, "key", key)
        check.shape("value", value, key.shape)
        tokens = key.shape[1]
        planned = self._shape.copy()
        slot, moves = planned.allocate(tokens, slot)
        index = self._index([0, tokens, slot, planned.start(slot)])
        # Writes into the free slot first, which no row can see yet, and then moves: if an op
        # raises, no row has changed.
        insert_kv(
            key, value, self.keys, self.values, index[:2], index[2:3], index[3:], **self.scales()
        )  # fmt: skip
        self._touch(slot, planned)
        self._move(moves)
        self._commit(planned)
        return slot

    def extract(
        self,
        slot: int,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies the row in `slot` out, unpadded.

        `key[l, t, h] = keys[l, slot, h, shape.start(slot) + t]`, values likewise.

        Args:
            slot: int, a slot in use.
            out: key and value to write into instead of new ones; see `extract_kv`. Written.
            dtype: for an eight-bit cache: the float dtype to return; None for the stored tokens
                with their scales, `[..., head_dim + 4]`.

        Returns:
            key, value: `[num_layers, tokens, num_kv_heads, head_dim]`, in a form that `insert`
                takes.

        Raises:
            ValueError: slot is not in use.

        Source: BATON, preemption: copy the row out, resume it by inserting.
        """
        tokens = self._shape.length(slot)
        index = self._index([0, tokens, slot, self._shape.start(slot)])
        return extract_kv(
            self.keys, self.values, index[:2], index[2:3], index[3:], total_tokens=tokens, out=out,
            **self.scales(), **({} if dtype is None else {"dtype": dtype}),
        )  # fmt: skip

    def copy_row(self, slot: int, target: int | None = None, *, length: int | None = None) -> int:
        """Copies the row in `slot` into a free slot, e.g. to sample several answers to one prompt.

        Token t of the new row is token t of the row in `slot`, in all layers.

        Args:
            slot: int, a slot in use.
            target: int, the free slot to take; None takes the lowest.
            length: int, 0 to the row's length; only the first `length` tokens are copied. None
                copies all.

        Returns:
            The slot of the copy.

        Raises:
            ValueError: slot is not in use, length or target is out of range, target is in use, or
                no slot is free.

        Source: parallel sampling; the prompt is computed once.
        """
        tokens = self._shape.length(slot)
        if length is not None:
            tokens = checked_int("KVCache.copy_row", "length", length, 0, tokens)
        planned = self._shape.copy()
        target, moves = planned.allocate(tokens, target)
        places = (slot, self._shape.start(slot), target, planned.start(target), tokens)
        # As in `insert`: writes into the free slot first, which no row can see yet, then moves.
        if tokens:
            index = self._index([[place] for place in places])
            move_kv(self.keys, self.values, *index, **self.scales())
        self._touch(target, planned)
        self._move(moves)
        self._commit(planned)
        return target

    def free(self, slot: int) -> None:
        """Forgets the row in `slot`. Nothing is cleared; see `release` and `trim`.

        Args:
            slot: int, a slot in use.

        Raises:
            ValueError: slot is not in use.
        """
        self._shape.free(slot)

    def trim(self) -> None:
        """Aligned: moves all rows left by the padding common to them. Ragged: nothing to do.

        Source: BATON, removal: columns that are padding in all surviving rows are dropped.
        """
        planned = self._shape.copy()
        moves = planned.trim()
        self._move(moves)
        self._commit(planned)

    def resize(self, num_slots: int) -> None:
        """Changes the number of slots; every row keeps its slot, its columns and its content.

        Only valid columns are copied, so untouched memory stays uncommitted. While it runs, the
        valid columns exist twice. Views of the former keys and values no longer belong to the
        cache.

        Args:
            num_slots: int, more than the highest slot in use.

        Raises:
            ValueError: num_slots is below 1, or a slot in use would be dropped.
            MemoryError: the address space could not be reserved.

        Source: BATON, flexible batch sizes.
        """
        planned = self._shape.copy()
        planned.resize(num_slots)
        if planned == self._shape:
            return
        memory = self._new_memory(planned.num_slots)
        for slot in planned.used:
            memory.copy_row(slot, slice(planned.start(slot), planned.end(slot)), self._memory)
        self._bytes_moved += self.bytes_in_use
        self._memory = memory
        self._touched = [(0, 0)] * planned.num_slots
        self._commit(planned)

    def release(self) -> None:
        """Returns the memory of free slots to the operating system.

        On other devices than the CPU, memory cannot be returned per slot, and this does nothing.

        Undefined: the content of free slots, before and after.
        """
        for slot in set(range(self._shape.num_slots)).difference(self._shape.used):
            self._memory.release(slot)
            self._touched[slot] = (0, 0)

    def release_below(self, slot: int, column: int) -> None:
        """Returns the memory of a slot's columns below `column` to the operating system, page by
        page. Meant for columns behind a sliding window, which are not read again.

        On other devices than the CPU it does nothing.

        Args:
            slot: int, in use or free.
            column: int, from 0 to the capacity.

        Raises:
            TypeError: an argument is not an integer.
            ValueError: an argument is out of range.

        Undefined: the content of these columns from now on.
        """
        slot = checked_int("KVCache.release_below", "slot", slot, 0, self._shape.num_slots - 1)
        column = checked_int("KVCache.release_below", "column", column, 0, self._shape.capacity)
        self._memory.release_below(slot, column)
        low, high = self._touched[slot]
        self._touched[slot] = (max(low, column), max(high, column))

    def __repr__(self) -> str:
        return (
            f"KVCache(num_layers={self._num_layers}, num_kv_heads={self._num_kv_heads}, "
            f"head_dim={self._head_dim}, dtype={self._dtype}, device={self._device}, "
            f"shape={self._shape})"
        )

    def _index(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)

    def _move(self, moves: Moves) -> None:
        if moves:
            index = (
                moves.source_slots,
                moves.source_starts,
                moves.target_slots,
                moves.target_starts,
                moves.lengths,
            )
            # One tensor and views of its rows, so that one copy to a device replaces five.
            move_kv(self.keys, self.values, *self._index(index), **self.scales())
            self._bytes_moved += self.bytes_per_token * sum(moves.lengths)

    def _commit(self, planned: BatchShape) -> None:
        self._shape.assign(planned)
        for slot in planned.used:
            self._touch(slot, planned)
