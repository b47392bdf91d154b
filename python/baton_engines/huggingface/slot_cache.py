"""A transformers cache in slots: appended in place, and rows that come and go between two steps.

DynamicCache copies every key and value at every step, StaticCache attends to its whole capacity
under attention that takes a dense mask. `SlotCache` writes each token into its column and leaves
the rest where it is; with `attn_implementation="baton"` attention reads each row's own columns.
Rows are aligned as `generate` has them: all end in the same column, padding on the left. `insert`,
`merge` and `select` are BATON for anybody's own loop over an unmodified model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

import baton_kernels as kernels
from baton_kernels.batch_shape import checked_int


def slot_cache(model: PreTrainedModel, capacity: int) -> SlotCache:
    """An empty `SlotCache` for a model.

    Args:
        model: a decoder of transformers.
        capacity: int, at least 1; most tokens of a row, padding included.

    Raises:
        ValueError: capacity is below 1.
        NotImplementedError: a layer of the model keeps another state than keys and values.
    """
    return SlotCache(model.config, capacity)


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes its cache, so that `model(ids, **{cache_argument(model):
    cache})` is right for every transformers: from 5.24 on "cache", before it "past_key_values".

    Args:
        model: of transformers.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class SlotCache(Cache):
    """Keys and values of all layers in slots of a fixed capacity; slot i is row i of the batch.

    Memory is taken at the first forward, when the number of rows is known; on the CPU it is
    committed as columns are written. Shapes never change, so a compiled decode step is one graph.

    `insert`, `merge` and `select` change rows between two steps. The rows that stay keep their keys
    and values bit by bit. Each takes the batch's attention mask `[rows, tokens]` and returns the
    new one, from which a loop derives positions (`mask.cumsum(1) - 1`) as `generate` does.

    Args:
        config: of the model.
        capacity: int, at least 1; most tokens of a row, padding included.

    Raises:
        ValueError: capacity is below 1.
        NotImplementedError: a layer keeps another state than keys and values.

    Source: BATON, shaping and embedding of a new query, removal of finished ones.
    """

    def __init__(self, config: PreTrainedConfig, capacity: int) -> None:
        self.capacity = checked_int("SlotCache", "capacity", capacity, 1)
        config = config.get_text_config(decoder=True)
        kinds = set(getattr(config, "layer_types", None) or ())
        others = sorted(kinds - {"full_attention", "sliding_attention"})
        if others:
            raise NotImplementedError(
                "SlotCache: layer_types of the config must be full_attention or "
                f"sliding_attention, got {', '.join(others)}"
            )
        super().__init__(layers=[SlotLayer(capacity) for _ in range(config.num_hidden_layers)])

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """`layers`, all of which are of one kind."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    def insert(
        self,
        other: SlotCache,
        row: int,
        attention_mask: torch.Tensor,
        other_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let a prefilled query take a row of the running batch.

        The query's tokens end in the batch's last column. If it is longer than the batch, the other
        rows move to the right first.

        Args:
            other: SlotCache of the same model with one row.
            row: int; the row it takes, whose query is forgotten.
            attention_mask: `[rows, tokens]` of this batch.
            other_mask: `[1, tokens]` of the query; None if it has no padding.

        Returns:
            The batch's mask from now on, `[rows, tokens]`.

        Raises:
            ValueError: row is out of range, `other` has more or fewer than one row, is of another
                model or does not fit the capacity, or a mask does not fit its cache.
        """
        where = "SlotCache.insert"
        rows = self._rows(where, self, attention_mask)
        if self._rows(where, other, other_mask) != 1:
            raise ValueError(f"{where}: other must have 1 row, got {other.batch_size}")
        row = checked_int(where, "row", row, 0, rows - 1)
        return self._place(where, other, [row], attention_mask, other_mask, rows)

    def merge(
        self,
        other: SlotCache,
        attention_mask: torch.Tensor,
        other_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Append the rows of another batch below those of this one.

        Args:
            other: SlotCache of the same model.
            attention_mask: `[rows, tokens]` of this batch.
            other_mask: `[other rows, tokens]` of the other; None if it has no padding.

        Returns:
            The mask of both, `[rows + other rows, tokens]`.

        Raises:
            ValueError: as `insert`.
        """
        where = "SlotCache.merge"
        rows = self._rows(where, self, attention_mask)
        added = self._rows(where, other, other_mask)
        targets = list(range(rows, rows + added))
        return self._place(where, other, targets, attention_mask, other_mask, rows + added)

    def select(self, rows: Sequence[int], attention_mask: torch.Tensor) -> torch.Tensor:
        """Keep these rows, in this order; the columns that are padding in all of them go.

        Args:
            rows: ints, at least one.
            attention_mask: `[rows, tokens]` of this batch.

        Returns:
            The mask of the rows that stay, `[len(rows), tokens]`.

        Raises:
            ValueError: rows is empty or names a row that is not there, or the mask does not fit.
        """
        where = "SlotCache.select"
        there = self._rows(where, self, attention_mask)
        rows = [checked_int(where, "rows", row, 0, there - 1) for row in rows]
        if not rows:
            raise ValueError(f"{where}: rows must be at least one row, got none")
        mask = attention_mask[rows]
        padding = int((mask.cumsum(1) == 0).sum(1).min())
        for layer in self.slot_layers:
            layer.select(rows, padding)
        return mask[:, padding:]

    def _place(
        self,
        where: str,
        other: SlotCache,
        targets: Sequence[int],
        attention_mask: torch.Tensor,
        other_mask: torch.Tensor | None,
        num_rows: int,
    ) -> torch.Tensor:
        """Put the rows of another cache at `targets` of `num_rows` rows; the new mask."""
        mine, theirs = int(self.get_seq_length()), int(other.get_seq_length())
        length = max(mine, theirs)
        if length > self.capacity:
            raise ValueError(
                f"{where}: other must have at most {self.capacity} tokens, the capacity, "
                f"got {theirs}"
            )
        for layer, source in zip(self.slot_layers, other.slot_layers, strict=True):
            layer.place(source, targets, length, num_rows)
        mask = attention_mask.new_zeros(num_rows, length)
        mask[: attention_mask.shape[0], length - mine :] = attention_mask
        mask[targets] = 0
        mask[targets, length - theirs :] = (
            1 if other_mask is None else other_mask.to(mask.device, mask.dtype)
        )
        return mask

    def _rows(self, where: str, cache: SlotCache, mask: torch.Tensor | None) -> int:
        """The rows of a cache, whose sizes and mask fit this one."""
        name = "self" if cache is self else "other"
        if not isinstance(cache, SlotCache) or not cache.slot_layers[0].is_initialized:
            raise ValueError(f"{where}: {name} must be a SlotCache with rows, got none")
        sizes = [layer.sizes for layer in self.slot_layers]
        theirs = [layer.sizes for layer in cache.slot_layers]
        if theirs != sizes:
            raise ValueError(
                f"{where}: other must be of the same model, (KV heads, head_dim, dtype, device) = "
                f"{sizes[0]} in {len(sizes)} layers, got {theirs[0]} in {len(theirs)}"
            )
        rows, tokens = cache.batch_size, int(cache.get_seq_length())
        if mask is not None and tuple(mask.shape) != (rows, tokens):
            argument = "attention_mask" if cache is self else "other_mask"
            raise ValueError(
                f"{where}: {argument} must be of shape [{rows}, {tokens}], got {list(mask.shape)}"
            )
        return rows


class SlotLayer(CacheLayerMixin):
    """One layer of a `SlotCache`.

    Args:
        capacity: columns of a row.

    Attributes:
        keys, values: `[rows, num_kv_heads, capacity, head_dim]`, once there are rows.
        cumulative_length: 0-d int64 on their device: the columns in use. A tensor, because a
            compiled step must not depend on its value.
        batch_size: rows, once there are any.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = True
    # None in the base class until there is memory; nothing here reads them before.
    keys: torch.Tensor
    values: torch.Tensor
    cumulative_length: torch.Tensor  # type: ignore[assignment]  # an int in some other layers

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        with torch.inference_mode(False):
            self.cumulative_length = torch.zeros((), dtype=torch.long)

    @property
    def sizes(self) -> tuple[int, int, torch.dtype, torch.device]:
        """KV heads, head_dim, dtype and device."""
        return self.keys.shape[1], self.keys.shape[3], self.keys.dtype, self.keys.device

    @property
    def bytes_committed(self) -> int:
        """Bytes of memory that the columns in use take."""
        if not self.is_initialized:
            return 0
        rows, num_kv_heads, _, head_dim = self.keys.shape
        column = 2 * num_kv_heads * head_dim * self.keys.itemsize
        return rows * column * int(self.cumulative_length)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory for the rows of the first keys and values.

        Raises:
            NotImplementedError: keys and values differ in shape, or the ops do not take their
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
        columns = torch.arange(tokens, device=device) + self.cumulative_length
        slots = torch.arange(rows, dtype=torch.int32, device=device)
        kernels.append_kv(
            key_states.transpose(1, 2).reshape(rows * tokens, num_kv_heads, head_dim),
            value_states.transpose(1, 2).reshape(rows * tokens, num_kv_heads, head_dim),
            self.keys,
            self.values,
            slots.repeat_interleave(tokens, output_size=rows * tokens),
            columns.int().repeat(rows),
        )
        self.cumulative_length.add_(tokens)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of keys, and how many were dropped on the left."""
        return self.capacity, 0

    # As in transformers' own static layers, whose annotation says int all the same.
    def get_seq_length(self) -> int | torch.Tensor:  # type: ignore[override]
        """Columns in use, padding included."""
        return self.cumulative_length if self.is_initialized else 0

    def get_max_length(self) -> int:
        """The capacity."""
        return self.capacity

    def reset(self) -> None:
        """Forget all tokens; the memory stays, and is not cleared."""
        self.cumulative_length.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row.

        Args:
            tokens_to_remove: int, at most 0, as in transformers.

        Raises:
            ValueError: it is positive, or there are not that many tokens.
        """
        if not -int(self.cumulative_length) <= tokens_to_remove <= 0:
            raise ValueError(
                f"SlotCache.crop: tokens_to_remove must be from {-int(self.cumulative_length)} to "
                f"0, got {tokens_to_remove}"
            )
        self.cumulative_length.add_(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        if self.is_initialized:
            self.select(beam_idx.tolist(), 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, one after the other."""
        if self.is_initialized:
            self.select([row for row in range(self.batch_size) for _ in range(repeats)], 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        if self.is_initialized:
            self.select(torch.arange(self.batch_size)[indices.cpu()].tolist(), 0)

    def select(self, rows: Sequence[int], padding: int) -> None:
        """Keep these rows in this order without their first `padding` columns.

        Where the number of rows stays, only rows that change are copied.
        """
        length = int(self.cumulative_length) - padding
        former = self.keys, self.values
        columns = slice(padding, padding + length)
        if len(rows) != self.batch_size:
            self._allocate(len(rows), *self.sizes)
            for old, new in zip(former, (self.keys, self.values), strict=True):
                new[:, :, :length] = old[rows, :, columns]
        else:
            changed = [row for row, source in enumerate(rows) if row != source]
            if changed:
                sources = [rows[row] for row in changed]
                for tensor in former:
                    tensor[changed, :, columns] = tensor[sources, :, columns]
            if padding:
                self._move(range(len(rows)), padding, 0, length)
        self.cumulative_length.sub_(padding)

    def place(self, other: SlotLayer, targets: Sequence[int], length: int, num_rows: int) -> None:
        """Copy the rows of another layer to `targets`, all rows ending in column `length`."""
        mine, theirs = int(self.cumulative_length), int(other.cumulative_length)
        former, there = (self.keys, self.values), self.batch_size
        if num_rows != there:
            self._allocate(num_rows, *self.sizes)
            for old, new in zip(former, (self.keys, self.values), strict=True):
                new[:there, :, length - mine : length] = old[:, :, :mine]
        elif length != mine:
            staying = [row for row in range(there) if row not in targets]
            self._move(staying, 0, length - mine, mine)
        for new, old in ((self.keys, other.keys), (self.values, other.values)):
            new[targets, :, length - theirs : length] = old[:, :, :theirs]
        self.cumulative_length.fill_(length)

    def _allocate(
        self,
        rows: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """New memory for this many rows; a KVCache has it, which commits what is written."""
        # What is made in inference mode could not be changed outside of it, where a loop may call
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
