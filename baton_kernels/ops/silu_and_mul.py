"""silu_and_mul: the gated activation of a Llama MLP."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, as_rows, call

_native = ops.silu_and_mul.default


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """Gates the second half of each row with the SiLU of the first.

    ::

        y = silu(x[..., :d]) * x[..., d:],   silu(a) = a / (1 + exp(-a))     computed in float32

    Args:
        x: `[..., 2 * d]`, float32, float16 or bfloat16, last dimension contiguous: gate, then up.
            torch.ops takes `[rows, 2 * d]` only.

    Returns:
        y `[..., d]`, contiguous.

    Raises:
        ValueError: A shape or stride does not fit.
        TypeError: The dtype is not supported.

    Source: LlamaMLP of Hugging Face transformers with merged gate and up projections.
    """
    if x.dim() == 2:
        return call("silu_and_mul", _native, check_arguments, x)
    y = call("silu_and_mul", _native, check_arguments, as_rows(x))
    return y.view(*x.shape[:-1], y.shape[-1])


def check_arguments(x) -> None:
    check = Checker("silu_and_mul")
    check.floating("x", x)
    check.dims("x", x, 2)
    if x.shape[1] % 2:
        check.fail("x", "of even width", list(x.shape))
    check.last_contiguous("x", x)


@torch.library.register_fake("baton_kernels::silu_and_mul")
def _fake(x):
    check_arguments(x)
    return x.new_empty((x.shape[0], x.shape[1] // 2))
