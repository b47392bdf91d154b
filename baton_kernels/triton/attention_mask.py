"""attention_mask in Triton: every element is written once, and nothing else is made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.attention_mask import check_arguments
from baton_kernels.ops.checks import default_starts
from baton_kernels.triton import common

# 32 lines x 128 columns: a warp writes whole 128-byte runs, also of a mask of bytes.
BLOCK_LINES, BLOCK_COLUMNS = 32, 128


def attention_mask(
    starts: torch.Tensor | None,
    lengths: torch.Tensor,
    query_length: int,
    key_length: int,
    *,
    dtype: torch.dtype = torch.bool,
    window: int | None = None,
) -> torch.Tensor:
    """`baton_kernels.attention_mask` in Triton."""
    return run(starts, lengths, query_length, key_length, dtype, window)


def run(starts, lengths, query_length, key_length, dtype=torch.bool, window=None) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.attention_mask."""
    check_arguments(starts, lengths, query_length, key_length, dtype, window)
    common.require_gpu("attention_mask", "lengths", lengths)
    rows = lengths.shape[0]
    starts = default_starts(starts, rows, lengths.device)
    mask = starts.new_empty((rows, 1, query_length, key_length), dtype=dtype)
    lines = rows * query_length
    # Elements are written as integers: their bits are all that matters.
    element = torch.uint8
    hidden: float = 0
    if dtype != torch.bool:
        element = torch.int32 if dtype.itemsize == 4 else torch.int16
        hidden = torch.tensor(torch.finfo(dtype).min, dtype=dtype).view(element).item()
    common.launch(
        attention_mask_kernel,
        common.ceil_div(lines, BLOCK_LINES) * common.ceil_div(key_length, BLOCK_COLUMNS),
        starts.device,
        mask.view(element), starts, lengths, lines, query_length, key_length,
        HAS_WINDOW=window is not None, window=window or 0,
        VISIBLE=1 if dtype == torch.bool else 0, HIDDEN=hidden,
        BLOCK_LINES=BLOCK_LINES, BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip
    return mask


@triton.jit
def visible_columns(start, length, query, query_length, window, HAS_WINDOW: tl.constexpr):
    """First and last column that a query sees, int64; first > last where it sees none.

    In int64, because a window may be as large as int32 holds.
    """
    last = start.to(tl.int64) + length - query_length + query
    first = start.to(tl.int64)
    if HAS_WINDOW:
        first = tl.maximum(first, last - window + 1)
    return first, last


@triton.jit(do_not_specialize=["lines", "query_length", "window"])
def attention_mask_kernel(
    mask_ptr, starts_ptr, lengths_ptr,  # [rows, 1, query_length, key_length], [rows], [rows]
    lines, query_length, key_length, window,
    HAS_WINDOW: tl.constexpr, VISIBLE: tl.constexpr, HIDDEN: tl.constexpr,
    BLOCK_LINES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(key_length, BLOCK_COLUMNS)
    line = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_LINES + tl.arange(0, BLOCK_LINES)
    column = tl.program_id(0) % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_line = line < lines
    start = tl.load(starts_ptr + line // query_length, mask=is_line, other=0)
    length = tl.load(lengths_ptr + line // query_length, mask=is_line, other=0)
    first, last = visible_columns(
        start, length, line % query_length, query_length, window, HAS_WINDOW
    )
    # Columns fit in int32, and so does what they are compared with once it is cut to their range.
    first = tl.minimum(tl.maximum(first, 0), key_length).to(tl.int32)
    last = tl.minimum(tl.maximum(last, -1), key_length).to(tl.int32)
    visible = (column[None, :] >= first[:, None]) & (column[None, :] <= last[:, None])
    element = tl.where(visible, VISIBLE, HIDDEN).to(mask_ptr.dtype.element_ty)
    tl.store(
        mask_ptr + line[:, None] * key_length + column[None, :],
        element,
        mask=is_line[:, None] & (column < key_length)[None, :],
    )
