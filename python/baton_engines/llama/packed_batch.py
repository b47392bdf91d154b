"""Describes which tokens a forward pass computes, and where their keys and values go.

A packed batch is any mixture of queries: prefilling queries have many tokens, decoding queries one
each. The tokens are packed one after the other without padding, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from baton_kernels import BatchShape


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The rows of one forward pass; row i computes the last `query_lengths[i]` tokens of its query.

    Slot 0 decodes its sixth token, slot 2 prefills three tokens, ragged shape:

        slots           0  2
        query_lengths   1  3            lengths         6  3
        packed token    0  1  2  3      cu_seqlens_q    0  1  4
        token_slots     0  2  2  2      last_tokens     0  3
        token_columns   5  0  1  2      positions       5  0  1  2

    Args:
        cu_seqlens_q: int32 `[rows + 1]`; row i computes the packed tokens `[cu_seqlens_q[i],
            cu_seqlens_q[i + 1])`.
        slots: int32 `[rows]`.
        starts: int32 `[rows]`, in columns.
        lengths: int32 `[rows]`, in tokens, including those of this pass.
        token_slots: int32 `[total_tokens]`; the slot of each packed token.
        token_columns: int32 `[total_tokens]`; its column.
        positions: int32 `[total_tokens]`; its position in its query, as used by RoPE.
        last_tokens: int32 `[rows]`; the packed index of each row's last token.
        query_lengths: tuple of int; the number of tokens that each row computes, on the host.
        total_lengths: tuple of int; `lengths` on the host, so that the device need not be read.
        max_query_length: int, the largest of `query_lengths`.
        max_length: int, the largest of `lengths`.
        padding: tuple of int; the number of padding tokens after each row's tokens. They are
            computed and cached like tokens, at positions and columns behind the row's last token:
            `cu_seqlens_q`, `lengths` and the packed tensors count them, `query_lengths`,
            `total_lengths` and `last_tokens` do not.
    """

    cu_seqlens_q: torch.Tensor
    slots: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    token_slots: torch.Tensor
    token_columns: torch.Tensor
    positions: torch.Tensor
    last_tokens: torch.Tensor
    query_lengths: tuple[int, ...]
    total_lengths: tuple[int, ...]
    max_query_length: int
    max_length: int
    padding: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Number of queries in the batch."""
        return len(self.query_lengths)

    @property
    def total_tokens(self) -> int:
        """Number of packed tokens, padding included."""
        return sum(self.query_lengths) + sum(self.padding)

    @classmethod
    def from_shape(
        cls,
        shape: BatchShape,
        slots: Iterable[int],
        query_lengths: Iterable[int] | None = None,
        device: torch.device | str = "cpu",
        *,
        padded: bool = False,
    ) -> PackedBatch:
        """The batch that computes the last tokens of rows of a shape.

        The shape must already count the tokens to compute: allocate or extend first, then build
        the batch.

        Args:
            shape: BatchShape; read, not kept.
            slots: ints, distinct, in use, at least one; the rows in the order of the packed tokens.
            query_lengths: ints, one per slot, from 1 to the row's length; None means 1 each (a
                decode step).
            device: where to create the tensors: the device of the model and the cache.
            padded: bool; whether every row is padded at its end to the number of tokens of the
                longest. The shape does not count the padding, whose columns must be free.

        Raises:
            ValueError: no slot, a slot not in use or named twice, query_lengths that do not fit, or
                padding beyond the capacity.
        """
        slots = list(slots)
        query_lengths = [1] * len(slots) if query_lengths is None else list(query_lengths)
        lengths = [shape.length(slot) for slot in slots]
        starts = [shape.start(slot) for slot in slots]
        _check_rows(slots, query_lengths, lengths)
        longest = max(query_lengths)
        padding = [longest - count if padded else 0 for count in query_lengths]
        last = max(shape.end(slot) + pad for slot, pad in zip(slots, padding, strict=True))
        if last > shape.capacity:
            raise ValueError(
                f"PackedBatch.from_shape: padding must be within the capacity {shape.capacity}, "
                f"got {last} columns"
            )

        cu_seqlens, last_tokens, token_slots = [0], list[int](), list[int]()
        token_columns, positions = list[int](), list[int]()
        for slot, start, length, count, pad in zip(
            slots, starts, lengths, query_lengths, padding, strict=True
        ):
            last_tokens.append(cu_seqlens[-1] + count - 1)
            cu_seqlens.append(cu_seqlens[-1] + count + pad)
            token_slots.extend([slot] * (count + pad))
            token_columns.extend(range(start + length - count, start + length + pad))
            positions.extend(range(length - count, length + pad))
        padded_lengths = [length + pad for length, pad in zip(lengths, padding, strict=True)]

        parts = {
            "cu_seqlens_q": cu_seqlens,
            "slots": slots,
            "starts": starts,
            "lengths": padded_lengths,
            "token_slots": token_slots,
            "token_columns": token_columns,
            "positions": positions,
            "last_tokens": last_tokens,
        }
        # One tensor and views of it, so that one copy to the device replaces eight.
        packed = torch.tensor(
            [number for part in parts.values() for number in part], dtype=torch.int32, device=device
        )
        views = packed.split([len(part) for part in parts.values()])
        return cls(
            **dict(zip(parts, views, strict=True)),
            query_lengths=tuple(query_lengths),
            total_lengths=tuple(lengths),
            max_query_length=longest,
            max_length=max(padded_lengths),
            padding=tuple(padding),
        )


def _check_rows(slots: list[int], query_lengths: list[int], lengths: list[int]) -> None:
    where = "PackedBatch.from_shape"
    if not slots:
        raise ValueError(f"{where}: slots must be at least one slot, got none")
    if len(set(slots)) != len(slots):
        raise ValueError(f"{where}: slots must be distinct, got {slots}")
    if len(query_lengths) != len(slots):
        raise ValueError(
            f"{where}: query_lengths must be one per slot ({len(slots)}), got {len(query_lengths)}"
        )
    for slot, count, length in zip(slots, query_lengths, lengths, strict=True):
        if not 1 <= count <= length:
            raise ValueError(
                f"{where}: query_lengths must be from 1 to the length of the row in slot {slot} "
                f"({length}), got {count}"
            )
