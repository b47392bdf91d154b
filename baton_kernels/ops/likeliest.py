"""likeliest: the greedy choice of a token per row, and whether the row is sound."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call

_native = ops.likeliest.default


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The index of the largest element of each row.

    ::

        tokens[i] = argmax(logits[i]), the first of several, if all of logits[i] is finite; else -1

    One pass, where `argmax` and `isfinite` take three.

    Args:
        logits: `[rows, vocab]`, float32, float16 or bfloat16, last dimension contiguous, vocab at
            least 1.

    Returns:
        int64 `[rows]`.

    Raises:
        ValueError: The shape or a stride does not fit.
        TypeError: The dtype is not supported.

    Source: greedy decoding; torch.argmax, which returns the index of a NaN instead of -1.
    """
    return call("likeliest", _native, check_arguments, logits)


def check_arguments(logits) -> None:
    check = Checker("likeliest")
    check.floating("logits", logits)
    check.dims("logits", logits, 2)
    if logits.shape[1] < 1:
        check.fail("logits", "at least 1 wide", list(logits.shape))
    check.last_contiguous("logits", logits)


@torch.library.register_fake("baton_kernels::likeliest")
def _fake(logits) -> torch.Tensor:
    check_arguments(logits)
    return logits.new_empty(logits.shape[0], dtype=torch.int64)
