"""The mask that `attn_implementation="baton"` hands from a transformers model to its attention.

transformers makes a mask once per step and layer type and passes it to every attention layer. Ours
says only where each row's valid columns are, so no `[rows, 1, queries, keys]` tensor exists. Models
pass a 4-D tensor through unchanged and rebuild anything else, hence the layout `[rows, 2 or 3, 1 +
window, 1]` of int32: starts and lengths in the layer's own columns, and the sliding window as the
size of a dimension without memory (stride 0), which the host can read without waiting for a device.
The third entry, if present, marks rows that could not be checked on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import torch
from transformers.masking_utils import causal_mask_function

# Why a mask cannot be expressed as one span of columns per row; these texts end up in a warning.
NOT_CAUSAL = "the mask is not causal"
CHUNKED = "attention is chunked"
OVERLAID = "packed sequences or bidirectional blocks overlay the causal mask"
NOT_LEFT_PADDED = "the attention mask has holes or padding on the right"


class Rows(NamedTuple):
    """A decoded mask.

    Attributes:
        starts, lengths: `[rows]`, int32: the valid columns `[start, start + length)` of each row.
        window: how many tokens a token sees, itself included; None for all.
        unexpressed: `[rows]`, bool: rows whose padding is not on the left, where that could not be
            checked on the host; else None.
    """

    starts: torch.Tensor
    lengths: torch.Tensor
    window: int | None
    unexpressed: torch.Tensor | None


def find_window(
    mask_function: Callable[..., object],
    q_length: int,
    local_size: int | None,
    sliding_window: int | None,
    *,
    allow_is_causal_skip: bool,
    use_vmap: bool,
) -> int | None | str:
    """The sliding window of a plain causal mask, None without one, or why it is not plain.

    A pattern is a closure. It does not say what it is composed of, and must not be inspected while
    torch.compile traces, so this looks at what transformers passes along with it. transformers
    withdraws `allow_is_causal_skip` from a causal mask that something overlays. It also does so for
    single tokens of a static cache, for other reasons; there, overlays that add keys are recognized
    by their name.

    Args:
        mask_function: the pattern, of transformers' masking_utils.
        q_length: query tokens of a row.
        local_size: the size of a window or of a chunk, None without either.
        sliding_window: of the model's config.
        allow_is_causal_skip, use_vmap: what transformers passes to a mask function.
    """
    if use_vmap or not (allow_is_causal_skip or q_length == 1):
        return OVERLAID
    if local_size is None:
        return None if mask_function is causal_mask_function else OVERLAID
    if local_size != sliding_window:
        return CHUNKED
    return local_size if mask_function.__qualname__.startswith("and_masks.") else OVERLAID


def encode(
    batch_size: int,
    end: int | torch.Tensor,
    kv_offset: int,
    window: int | None,
    attention_mask: torch.Tensor | None,
    device: torch.device | str,
    *,
    checked: bool,
) -> torch.Tensor | None:
    """The mask of rows that end in one column; None if padding is not only on the left.

    `start = max(padding - kv_offset, 0)`, `length = end - kv_offset - start`.

    Args:
        batch_size: rows.
        end: tokens of every row up to the last query token, padding included; a tensor where a
            cache keeps it on the device.
        kv_offset: tokens that the layer's cache has dropped on the left.
        window: see `Rows`.
        attention_mask: bool `[batch_size, tokens]`, whether a token is valid; None if all are. May
            be longer than `end`: the rest is ignored.
        device: of the mask.
        checked: whether to read the values on the host. If not, rows that cannot be expressed are
            marked instead.
    """
    unexpressed = None
    if attention_mask is None:
        starts = torch.zeros(batch_size, dtype=torch.int32, device=device)
    else:
        column = torch.arange(attention_mask.shape[1], device=device)
        # A row without any valid token has no columns.
        first = torch.where(attention_mask, column, attention_mask.shape[1]).amin(1)
        padding = torch.clamp(first, max=end)
        unexpressed = (~attention_mask & (column >= padding[:, None]) & (column < end)).any(1)
        if not isinstance(end, torch.Tensor) and end > attention_mask.shape[1]:
            unexpressed = torch.ones_like(unexpressed)
        if checked:
            if unexpressed.any():
                return None
            unexpressed = None
        starts = (padding - kv_offset).clamp_(min=0).int()
    lengths = (end - kv_offset - starts).int()
    parts = [starts, lengths] if unexpressed is None else [starts, lengths, unexpressed.int()]
    extent = 1 if window is None else 1 + window
    return torch.stack(parts, 1)[:, :, None, None].expand(-1, -1, extent, -1)


def is_encoded(attention_mask: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether a mask was made by `encode`; dense masks are bool or floating point."""
    return attention_mask is not None and attention_mask.dtype == torch.int32


def decode(attention_mask: torch.Tensor) -> Rows:
    """The rows of an encoded mask.

    Args:
        attention_mask: what `encode` returned.
    """
    window = attention_mask.shape[2] - 1 or None
    starts, lengths, *marks = attention_mask[:, :, 0, 0].unbind(1)
    return Rows(
        starts.contiguous(), lengths.contiguous(), window, marks[0].bool() if marks else None
    )


def to_dense(rows: Rows, num_queries: int, num_keys: int) -> torch.Tensor:
    """The equivalent bool mask `[rows, 1, num_queries, num_keys]`, for other attention functions.

    Args:
        rows: a decoded mask. A row marked as unexpressed is wrong here too.
        num_queries: query tokens, the last of every row.
        num_keys: columns of keys.
    """
    device = rows.starts.device
    starts, ends = rows.starts[:, None, None], (rows.starts + rows.lengths)[:, None, None]
    key = torch.arange(num_keys, device=device)
    query = ends - num_queries + torch.arange(num_queries, device=device)[:, None]
    seen = (key >= starts) & (key <= query)
    if rows.window is not None:
        seen &= key > query - rows.window
    return seen[:, None]
