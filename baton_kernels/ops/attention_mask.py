"""attention_mask: the dense mask of a shaped batch, for engines that need one."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import FLOATS, Checker, call, count_rows, dtype_name

_native = ops.attention_mask.default


def attention_mask(
    starts: torch.Tensor | None,
    lengths: torch.Tensor,
    query_length: int,
    key_length: int,
    *,
    dtype: torch.dtype = torch.bool,
    window: int | None = None,
) -> torch.Tensor:
    """Builds the dense mask of a shaped batch: causal, window and padding in one pass.

    Query j of row i stands in column `c_q = starts[i] + lengths[i] - query_length + j` and sees
    column c when `starts[i] <= c <= c_q` and `c > c_q - window`. Two rows that end in column 5,
    query_length 2 (x visible)::

        starts = [0, 3], lengths = [5, 2]      row 0   x x x x .      row 1   . . . x .
                                                       x x x x x              . . . x x

    Args:
        starts: `[rows]`, int32: the first valid column; 0 if None.
        lengths: `[rows]`, int32: the number of valid columns.
        query_length: Query tokens per row, the last ones of each.
        key_length: Columns of the mask.
        dtype: torch.bool (True is visible), or float32, float16, bfloat16 (0 is visible, the
            dtype's lowest finite value hidden), to be added to scores.
        window: A token sees the last `window` tokens, itself included; all if None.

    Returns:
        `[rows, 1, query_length, key_length]` of dtype, contiguous.

    Raises:
        ValueError: A shape, device, index value or option does not fit.
        TypeError: dtype or an index tensor's dtype is not supported.

    Source: BATON (arXiv 2410.18701), the new mask of a shaped batch; values as in Hugging Face
    transformers.
    """
    # Converting a dtype takes most of a microsecond, so the default is not passed.
    options = () if dtype is torch.bool and window is None else (dtype, window)
    return call(
        "attention_mask",
        _native,
        check_arguments,
        starts,
        lengths,
        query_length,
        key_length,
        *options,
    )


def check_arguments(
    starts, lengths, query_length, key_length, dtype=torch.bool, window=None
) -> None:
    check = Checker("attention_mask")
    if dtype != torch.bool and dtype not in FLOATS:
        check.fail("dtype", "bool, float32, float16 or bfloat16", dtype_name(dtype), TypeError)
    check.tensor("lengths", lengths)
    rows = count_rows(starts, otherwise=lengths.numel())
    check.index_or_none("starts", starts, rows, lengths.device)
    check.index("lengths", lengths, rows, lengths.device)
    if query_length < 0:
        check.fail("query_length", "at least 0", query_length)
    if key_length < 0:
        check.fail("key_length", "at least 0", key_length)
    if window is not None and window < 1:
        check.fail("window", "at least 1", window)


@torch.library.register_fake("baton_kernels::attention_mask")
def _fake(starts, lengths, query_length, key_length, dtype=torch.bool, window=None):
    check_arguments(starts, lengths, query_length, key_length, dtype, window)
    return lengths.new_empty((lengths.shape[0], 1, query_length, key_length), dtype=dtype)
