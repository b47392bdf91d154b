"""A transformers cache in slots: appended in place, with rows that come and go between two steps.

DynamicCache copies every key and value at every step, and StaticCache attends to its whole capacity
under attention that takes a dense mask. `SlotCache` writes each token into its column and leaves
the rest where it is; with `attn_implementation="baton"` attention reads only each row's valid
columns. Rows are aligned as in `generate`: all end in the same column, with padding on the left.
`insert`, `merge` and `select` are BATON's re-batching for any loop over an unmodified model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from baton_kernels.batch_shape import checked_int

from .slot_layer import SlotLayer


def slot_cache(model: PreTrainedModel, capacity: int) -> SlotCache:
    """An empty `SlotCache` for a model.

    Args:
        model: a decoder of transformers.
        capacity: int, at least 1; most tokens of a row, padding included.

    Raises:
        ValueError: capacity is below 1.
        NotImplementedError: a layer of the model has a state other than keys and values.
    """
    return SlotCache(model.config, capacity)


def cache_argument(model: PreTrainedModel) -> str:
    """The name of a model's cache argument, so that `model(ids, **{cache_argument(model): cache})`
    works with every transformers: "cache" from 5.24 on, "past_key_values" before.

    Args:
        model: of transformers.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


class SlotCache(Cache):
    """Keys and values of all layers in slots of a fixed capacity; slot i is row i of the batch.

    Memory is taken at the first forward, when the number of rows is known. On the CPU it is
    committed as columns are written, and sliding layers give memory back behind their window.
    Shapes never change, so a compiled decode step is one graph.

    `insert`, `merge` and `select` change rows between two steps. The rows that stay keep their keys
    and values bit by bit. Each takes the batch's attention mask `[rows, tokens]` and returns the
    new one, from which a loop derives positions (`mask.cumsum(1) - 1`) as `generate` does.

    Args:
        config: of the model.
        capacity: int, at least 1; most tokens of a row, padding included.

    Raises:
        ValueError: capacity is below 1.
        NotImplementedError: a layer has a state other than keys and values.

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
        super().__init__(layers=[SlotLayer(capacity, window) for window in _windows(config)])

    @property
    def slot_layers(self) -> list[SlotLayer]:
        """`layers`, with the type that all of them have."""
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the next tokens of every row into one layer; see `SlotLayer.update`.

        Args:
            key_states, value_states: `[rows, num_kv_heads, tokens, head_dim]`.
            layer_idx: of the layer.
            args, kwargs: other arguments that transformers passes; ignored.
        """
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        # The layer before (of this forward, or of the last one) has finished its attention. So a
        # long prompt takes the memory of all its columns in one sliding layer at a time.
        self.slot_layers[layer_idx - 1].trim()
        return found

    def trim(self) -> None:
        """Give back the memory of columns that no later token of a sliding layer sees.

        Forwards do it by themselves, except compiled ones. On devices other than the CPU it does
        nothing.
        """
        for layer in self.slot_layers:
            layer.trim()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row.

        Args:
            tokens_to_remove: int, at most 0, as in transformers.

        Raises:
            ValueError: it is positive, there are not that many tokens, or sliding layers have given
                back columns that the next token would see; `activate_past_recording` keeps them.
        """
        for layer in self.slot_layers:
            layer.check_crop(tokens_to_remove)
        for layer in self.slot_layers:
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep all columns from now on, so that `crop` can go back; speculative decoding needs
        it."""
        for layer in self.slot_layers:
            layer.activate_past_recording()

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
            row: int; the row to use; the query in it is forgotten.
            attention_mask: `[rows, tokens]` of this batch.
            other_mask: `[1, tokens]` of the query; None if it has no padding.

        Returns:
            The batch's new mask, `[rows, tokens]`.

        Raises:
            ValueError: row is out of range, `other` does not have exactly one row, belongs to
                another model or does not fit the capacity, or a mask does not fit its cache.
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
        """Keep these rows, in this order, and drop the columns that are padding in all of them.

        Args:
            rows: ints, at least one.
            attention_mask: `[rows, tokens]` of this batch.

        Returns:
            The mask of the remaining rows, `[len(rows), tokens]`.

        Raises:
            ValueError: rows is empty or names a row that does not exist, or the mask does not fit.
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
        """Put the rows of another cache at `targets` of `num_rows` rows; return the new mask."""
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
        """The number of rows of a cache, after checking that its sizes and mask fit this one."""
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


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """The sliding window of each layer, None without one, as transformers' own caches see them."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
