"""rms_norm: root mean square normalization, with the residual addition fused in."""

from __future__ import annotations

from typing import overload

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, as_rows, call

_native = ops.rms_norm.default
_native_residual = ops.rms_norm.residual


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: None = None,
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    residual: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalizes each row by its root mean square.

    ::

        s = x, or x + residual rounded to x's dtype
        y = s / sqrt(mean(s ** 2) + eps) * weight        computed in float32, rounded once

    Args:
        x: `[..., size]`, float32, float16 or bfloat16, last dimension contiguous. torch.ops takes
            `[rows, size]` only.
        weight: `[size]`, x's dtype, contiguous.
        eps: Added to the mean square.
        residual: As x; added first if given.

    Returns:
        y, shaped as x, contiguous; with residual also s, the next residual.

    Raises:
        ValueError: A shape, stride, device or eps does not fit.
        TypeError: A dtype is not supported, or differs from x's.

    Source: LlamaRMSNorm of Hugging Face transformers, which rounds once more before the weight.
    """
    # Creating a view costs as much as a small row's arithmetic, so avoid it if the shape is right.
    if residual is None:
        if x.dim() == 2:
            return call("rms_norm", _native, check_arguments, x, weight, eps)
        return call("rms_norm", _native, check_arguments, as_rows(x), weight, eps).view(x.shape)
    if x.dim() > 0 and residual.shape != x.shape:
        Checker("rms_norm").fail("residual", f"of shape {list(x.shape)}", list(residual.shape))
    if x.dim() == 2:
        return call("rms_norm", _native_residual, check_arguments, x, weight, eps, residual)
    rows = as_rows(x), weight, eps, as_rows(residual)
    y, total = call("rms_norm", _native_residual, check_arguments, *rows)
    return y.view(x.shape), total.view(x.shape)


def check_arguments(x, weight, eps, residual=None) -> None:
    check = Checker("rms_norm")
    check.floating("x", x)
    check.dims("x", x, 2)
    if x.shape[1] < 1:
        check.fail("x", "at least 1 wide", list(x.shape))
    check.last_contiguous("x", x)
    check.dtype_as("weight", weight, "x", x)
    check.shape("weight", weight, [x.shape[1]])
    check.contiguous("weight", weight)
    if residual is not None:
        check.dtype_as("residual", residual, "x", x)
        check.shape("residual", residual, x.shape)
        check.last_contiguous("residual", residual)
    if not eps >= 0.0:
        check.fail("eps", "at least 0", eps)


@torch.library.register_fake("baton_kernels::rms_norm")
def _fake(x, weight, eps) -> torch.Tensor:
    check_arguments(x, weight, eps)
    return x.new_empty(x.shape)


@torch.library.register_fake("baton_kernels::rms_norm.residual")
def _fake_residual(x, weight, eps, residual) -> tuple[torch.Tensor, torch.Tensor]:
    check_arguments(x, weight, eps, residual)
    return x.new_empty(x.shape), x.new_empty(x.shape)
