"""linear: a projection whose rows do not depend on each other, bit by bit."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import Checker, call
from baton_kernels.ops.linear_packed import linear_packed, linear_packed_int8
from baton_kernels.ops.packed_weight import PackedWeight

_native = ops.linear.default


def linear(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Projects each row: `y = x @ weight.T + bias`, accumulated in float32.

    Batch invariance: the bits of a row of y depend only on that row of x, not on the number of
    rows. General matrix products choose their order of summation by the number of rows, so a
    query's logits change with the batch it is decoded in; with this op they do not. Weights are
    used unpacked, row-major, or as `pack_linear` has packed them, which CPUs read faster. They are
    read once per 96 rows. Packed weights are summed in another order, so the last bits differ.

    Weights packed to int8 are multiplied by rows of x that are rounded to int8 too, with a scale
    per 64 elements, because a few elements are often many times as large as the others. `y = (sum
    over groups of float32(sum of the group's products) * scale of the group) * scale of the weight
    + bias`: the sums of a group are exact, and groups are added up in float32 in order, so all CPUs
    compute the same bits. A row with NaN or infinity gives NaN throughout.

    Args:
        x: `[rows, in_features]`, float32, float16 or bfloat16, last dimension contiguous.
        weight: `[out_features, in_features]`, x's dtype, last dimension contiguous; or a
            `PackedWeight` of one.
        bias: `[out_features]`, x's dtype, contiguous; none if None.

    Returns:
        y `[rows, out_features]`, contiguous.

    Raises:
        ValueError: A shape, stride or device does not fit.
        TypeError: A dtype is not supported, or differs from x's.

    Source: torch.nn.functional.linear.
    """
    if isinstance(weight, PackedWeight):
        if weight.is_packed:
            panels, size, scales = weight.panels, weight.out_features, weight.scales
            if scales is not None:
                return linear_packed_int8(x, panels, scales, size, bias)
            return linear_packed(x, panels, size, bias)
        weight = weight.panels
    return call("linear", _native, check_arguments, x, weight, bias)


def check_arguments(x, weight, bias=None) -> None:
    check = Checker("linear")
    check.floating("x", x)
    check.dims("x", x, 2)
    check.last_contiguous("x", x)
    check.dtype_as("weight", weight, "x", x)
    check.dims("weight", weight, 2)
    check.last_contiguous("weight", weight)
    check.shape("weight", weight, [weight.shape[0], x.shape[1]])
    if bias is not None:
        check.dtype_as("bias", bias, "x", x)
        check.shape("bias", bias, [weight.shape[0]])
        check.contiguous("bias", bias)


@torch.library.register_fake("baton_kernels::linear")
def _fake(x, weight, bias=None):
    check_arguments(x, weight, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))
