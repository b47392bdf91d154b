"""One layer of a `SlotCache`: appends keys and values in place and frees what a window hides."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from transformers.cache_utils import CacheLayerMixin

import baton_kernels as kernels


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`.

    With a sliding window a token sees the last `window` columns, its own included. The memory of
    columns that no later token sees is given back page by page, on the CPU and outside of compiled
    code: a layer holds its window and at most two more pages per head. Other columns stay where
    they are.

    Args:
        capacity: columns of a row.
        window: the sliding window; None without one.

    Attributes:
        keys, values: `[rows, num_kv_heads, capacity, head_dim]`, once there are rows.
        cumulative_length: 0-d int64 on their device: the number of columns in use. A tensor,
            because a compiled step must not depend on its value.
        batch_size: rows, once there are any.
        released: int; the content of columns below it is lost.
        record_past: bool; whether columns are kept, because `crop` may need them again.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = True
    # None in the base class until memory is allocated; nothing here reads them before that.
    keys: torch.Tensor
    values: torch.Tensor
    cumulative_length: torch.Tensor  # type: ignore[assignment]  # an int in some other layers

    def __init__(self, capacity: int, window: int | None = None) -> None:
        super().__init__()
        self.capacity = capacity
        self.window = window
        self.released = 0
        self.record_past = False
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.long)

    @property
    def sizes(self) -> tuple[int, int, torch.dtype, torch.device]:
        """KV heads, head_dim, dtype and device."""
        return self.keys.shape[1], self.keys.shape[3], self.keys.dtype, self.keys.device

    @property
    def bytes_committed(self) -> int:
        """Bytes of memory of the columns in use, without the released ones."""
        if not self.is_initialized:
            return 0
        rows, num_kv_heads, _, head_dim = self.keys.shape
        column = 2 * num_kv_heads * head_dim * self.keys.itemsize
        return rows * column * (int(self.cumulative_length) - self.released)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate memory for the rows of the first keys and values.

        Raises:
            NotImplementedError: keys and values differ in shape, or the ops do not support their
                head_dim or dtype.
        """
        if key_states.shape != value_states.shape:
            raise NotImplementedError(
                "SlotCache: keys and values must have one shape, got "
                f"{list(key_states.shape)} and {list(value_states.shape)}"
            )
        rows, num_kv_heads, _, head_dim = key_states.shape
        self._allocate(rows, num_kv_heads, head_dim, key_states.dtype, key_states.device)
        self.cumulative_length = self.cumulative_length.to(key_states.device)
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.cumulative_length)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next tokens of every row.

        Args:
            key_states, value_states: `[rows, num_kv_heads, tokens, head_dim]`.

        Returns:
            `keys` and `values`, all columns.

        Raises:
            ValueError: the number of rows changed, or the capacity would be exceeded (where the
                length is known on the host).
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        rows, num_kv_heads, tokens, head_dim = key_states.shape
        if rows != self.batch_size:
            raise ValueError(f"SlotCache: rows must be {self.batch_size}, got {rows}")
        device = key_states.device
        if device.type == "cpu" and not torch.compiler.is_compiling():
            end = int(self.cumulative_length) + tokens
            if end > self.capacity:
                raise ValueError(
                    f"SlotCache: tokens of a row must be at most {self.capacity}, the capacity, "
                    f"got {end}"
                )
        slots = None
        columns = self.cumulative_length.int()
        if tokens > 1:
            columns = columns + torch.arange(tokens, dtype=torch.int32, device=device)
            slots = torch.arange(rows, dtype=torch.int32, device=device)
            slots = slots.repeat_interleave(tokens, output_size=rows * tokens)
        kernels.append_kv(
            key_states.transpose(1, 2).reshape(rows * tokens, num_kv_heads, head_dim),
            value_states.transpose(1, 2).reshape(rows * tokens, num_kv_heads, head_dim),
            self.keys,
            self.values,
            slots,
            columns.repeat(rows),
        )
        self.cumulative_length.add_(tokens)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of key columns, and of columns that were dropped on the left."""
        return self.capacity, 0

    # As in transformers' own static layers, although their annotation says int.
    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Columns in use, padding included."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; the memory stays, and is not cleared."""
        self.cumulative_length.zero_()
        self.released = 0

    def trim(self) -> None:
        """Give back the memory of whole pages of columns that no later token sees.

        Does nothing without a window, on devices other than the CPU, in compiled code, and while
        the past is recorded.
        """
        if self.window is None or self.record_past or not self.is_initialized:
            return
        if self.keys.device.type != "cpu" or torch.compiler.is_compiling():
            return
        unseen = int(self.cumulative_length) + 1 - self.window
        column_bytes = self.keys.shape[3] * self.keys.itemsize
        if (unseen - self.released) * column_bytes < mmap.PAGESIZE:
            return
        for row in range(self.batch_size):
            self._memory.release_below(row, unseen)
        self.released = unseen

    def activate_past_recording(self) -> None:
        """Keep all columns from now on, so that `crop` can go back."""
        self.record_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise if `crop` could not do this.

        Args:
            tokens_to_remove: see `crop`.

        Raises:
            ValueError: see `crop`.
        """
        length = int(self.cumulative_length)
        least = -length
        # The next token would see columns that have been released.
        if self.window is not None and self.released:
            least = self.released + self.window - 1 - length
        if not least <= tokens_to_remove <= 0:
            hint = "; before that, call activate_past_recording" if self.released else ""
            raise ValueError(
                f"SlotCache.crop: tokens_to_remove must be from {least} to 0, "
                f"got {tokens_to_remove}{hint}"
            )

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row.

        Args:
            tokens_to_remove: int, at most 0, as in transformers.

        Raises:
            ValueError: it is positive, there are not that many tokens, or a sliding layer has given
                back columns that the next token would see.
        """
        self.check_crop(tokens_to_remove)
        self.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes a copy of the former row `beam_idx[i]`."""
        if self.is_initialized:
            self.select(beam_idx.tolist(), 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other."""
        if self.is_initialized:
            self.select([row for row in range(self.batch_size) for _ in range(repeats)], 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            self.select(torch.arange(self.batch_size)[indices.cpu()].tolist(), 0)

    def select(self, rows: Sequence[int], padding: int) -> None:
        """Keep these rows in this order, without their first `padding` columns.

        If the number of rows stays the same, only rows that change are copied.
        """
        end = int(self.cumulative_length)
        begin = max(padding, self.released)
        former = self.keys, self.values
        if len(rows) != self.batch_size:
            self._allocate(len(rows), *self.sizes)
            for old, new in zip(former, (self.keys, self.values), strict=True):
                new[:, :, begin - padding : end - padding] = old[rows, :, begin:end]
        else:
            changed = [row for row, source in enumerate(rows) if row != source]
            if changed:
                sources = [rows[row] for row in changed]
                for tensor in former:
                    tensor[changed, :, begin:end] = tensor[sources, :, begin:end]
            if padding:
                self._move(range(len(rows)), begin, begin - padding, end - begin)
        self.released = max(self.released - padding, 0)
        self.cumulative_length.sub_(padding)

    def place(self, other: SlotLayer, targets: Sequence[int], length: int, num_rows: int) -> None:
        """Copy the rows of another layer to `targets`; all rows then end in column `length`."""
        mine, theirs = int(self.cumulative_length), int(other.cumulative_length)
        former, there = (self.keys, self.values), self.batch_size
        # How far rows move, and the first columns that have content, before and after.
        by, their_by = length - mine, length - theirs
        first, their_first = self.released, other.released
        if num_rows != there:
            self._allocate(num_rows, *self.sizes)
            for old, new in zip(former, (self.keys, self.values), strict=True):
                new[:there, :, first + by : length] = old[:, :, first:mine]
        elif by:
            staying = [row for row in range(there) if row not in targets]
            self._move(staying, first, first + by, mine - first)
        for new, old in ((self.keys, other.keys), (self.values, other.values)):
            new[targets, :, their_first + their_by : length] = old[:, :, their_first:theirs]
        # Padding counts as released only if content was lost there.
        self.released = max(first and first + by, their_first and their_first + their_by)
        self.cumulative_length.fill_(length)

    def _allocate(
        self,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate this many rows, in a KVCache's memory, which is committed as it is written."""
        # Tensors made in inference mode could not be modified outside of it, where a loop may call
        # `insert` and others.
        with torch.inference_mode(False):
            self._memory = kernels.KVCache(
                1, rows, num_kv_heads, self.capacity, head_dim, dtype=dtype, device=device
            )
            self.keys, self.values = self._memory.layer(0)
        self.batch_size = rows
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)

    def _move(self, rows: Sequence[int], source: int, target: int, length: int) -> None:
        """Shift `length` columns of rows from column `source` to `target`."""
        count = len(rows)
        index = torch.tensor(
            [list(rows), [source] * count, list(rows), [target] * count, [length] * count],
            dtype=torch.int32,
            device=self.keys.device,
        )
        kernels.move_kv(self.keys, self.values, *index)
