"""masked_softmax: the softmax of a shaped batch's scores, with its mask applied inside."""

from __future__ import annotations

import math

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call

_native = ops.masked_softmax.default


def masked_softmax(
    scores: torch.Tensor,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax over the columns that each query of a shaped batch sees; no mask is ever built.

    Query j of row i stands in column `c_q = starts[i] + lengths[i] - query_length + j` and sees
    column c when `starts[i] <= c <= c_q` and `c > c_q - window`, as in `attention_mask`::

        weights[i, h, j, c] = exp(scale * scores[i, h, j, c]) / sum over visible c, or 0 if hidden

    Scores of hidden columns reach no result: they may hold anything, NaN included. A query that
    sees nothing gives zeros. Two rows that end in column 5, of one query and equal scores::

        starts = [0, 3], lengths = [5, 2]      .2 .2 .2 .2 .2
                                                0  0  0 .5 .5

    Batch invariance: the bits of a row's weights depend on its visible scores only, not on the
    rest of the batch or on its start.

    Args:
        scores: `[rows, num_heads, query_length, key_length]`, float32, float16 or bfloat16, last
            dimension contiguous.
        starts: `[rows]`, int32: the first valid column; 0 if None.
        lengths: `[rows]`, int32: the number of valid columns. Required.
        scale: Factor of the scores.
        window: A token sees the last `window` tokens, itself included; all if None.

    Returns:
        weights, of scores' shape and dtype, contiguous; computed in float32, rounded once.

    Raises:
        ValueError: A shape, stride, device, index value or option does not fit.
        TypeError: A dtype is not supported.

    On a GPU index values are not checked; the weights of a row out of range are undefined.

    Source: BATON (arXiv 2410.18701), the mask of a shaped batch; fused masked softmax as in
    Megatron-LM.
    """
    # As in ragged_attention, default options are not passed, to save time.
    options = () if scale == 1.0 and window is None else (scale, window)
    return call("masked_softmax", _native, check_arguments, scores, starts, lengths, *options)


def check_arguments(scores, starts, lengths, scale=1.0, window=None) -> None:
    check = Checker("masked_softmax")
    check.floating("scores", scores)
    check.dims("scores", scores, 4)
    check.last_contiguous("scores", scores)
    check.index_or_none("starts", starts, scores.shape[0], scores.device)
    check.index("lengths", lengths, scores.shape[0], scores.device)
    if not math.isfinite(scale):
        check.fail("scale", "finite", scale)
    if window is not None and window < 1:
        check.fail("window", "at least 1", window)


@torch.library.register_fake("baton_kernels::masked_softmax")
def _fake(scores, starts, lengths, scale=1.0, window=None):
    check_arguments(scores, starts, lengths, scale, window)
    return scores.new_empty(scores.shape)
