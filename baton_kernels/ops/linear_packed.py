"""linear from panels, and weights to and from panels: the CPU's ops behind `PackedWeight`."""

from __future__ import annotations

import torch

from baton_kernels._library import ops
from baton_kernels.ops.checks import FLOATS, Checker, call, dtype_name

# Outputs per panel; csrc/common/linear_packed.h describes the layout.
PANEL_OUTPUTS = 48
# How many consecutive elements of one output a panel holds; 1 for other dtypes.
_TERMS = {torch.bfloat16: 2, torch.int8: 4}

_linear = ops.linear_packed.default
_linear_int8 = ops.linear_packed.int8
_quantize = ops.quantize_linear.default
_pack = ops.pack_linear.default
_unpack = ops.unpack_linear.default


def panel_shape(dtype: torch.dtype, out_features: int, in_features: int) -> tuple[int, ...]:
    """The sizes of the panels of a weight."""
    panels = -(-out_features // PANEL_OUTPUTS)
    if dtype in _TERMS:
        terms = _TERMS[dtype]
        return (panels, -(-in_features // terms), PANEL_OUTPUTS, terms)
    return (panels, in_features, PANEL_OUTPUTS)


def linear_packed(
    x: torch.Tensor, panels: torch.Tensor, out_features: int, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear` with a weight that was packed; see there."""
    return call("linear_packed", _linear, _check_linear, x, panels, out_features, bias)


def linear_packed_int8(
    x: torch.Tensor,
    panels: torch.Tensor,
    scales: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear` with a weight that was rounded to int8 and packed; see there."""
    return call(
        "linear_packed", _linear_int8, _check_linear_int8, x, panels, scales, out_features, bias
    )


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight with its rows rounded to int8, and the float32 scale of each; see
    `pack_linear`."""
    return call("quantize_linear", _quantize, _check_quantize, weight)


def pack_into(weight: torch.Tensor, panels: torch.Tensor) -> None:
    """Packs a weight into `panels`, which have the shape `panel_shape` and are written."""
    call("pack_linear", _pack, _check_pack, weight, panels)


def unpack(
    panels: torch.Tensor,
    out_features: int,
    in_features: int,
    outputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The packed weight, or the rows of it that int32 `outputs` selects."""
    return call("unpack_linear", _unpack, _check_unpack, panels, out_features, in_features, outputs)


def _check_panels(check: Checker, panels, dtype, out_features, in_features) -> None:
    check.shape("panels", panels, panel_shape(dtype, out_features, in_features))
    check.contiguous("panels", panels)


def _check_size(check: Checker, name, size) -> None:
    if size < 0:
        check.fail(name, "a size", size)


def _check_linear(x, panels, out_features, bias=None) -> None:
    check = Checker("linear_packed")
    check.floating("x", x)
    check.dims("x", x, 2)
    check.last_contiguous("x", x)
    check.dtype_as("panels", panels, "x", x)
    _check_size(check, "out_features", out_features)
    _check_panels(check, panels, x.dtype, out_features, x.shape[1])
    _check_bias(check, bias, x, out_features)


def _check_linear_int8(x, panels, scales, out_features, bias=None) -> None:
    check = Checker("linear_packed")
    check.floating("x", x)
    check.dims("x", x, 2)
    check.last_contiguous("x", x)
    _check_size(check, "out_features", out_features)
    check.device("panels", panels, x.device)
    if panels.dtype != torch.int8:
        check.fail("panels", "int8", dtype_name(panels.dtype), TypeError)
    _check_panels(check, panels, torch.int8, out_features, x.shape[1])
    check.float32("scales", scales, x.device)
    check.shape("scales", scales, [out_features])
    check.contiguous("scales", scales)
    _check_bias(check, bias, x, out_features)


def _check_bias(check: Checker, bias, x, out_features) -> None:
    if bias is not None:
        check.dtype_as("bias", bias, "x", x)
        check.shape("bias", bias, [out_features])
        check.contiguous("bias", bias)


def _check_quantize(weight) -> None:
    check = Checker("quantize_linear")
    check.floating("weight", weight)
    check.dims("weight", weight, 2)
    check.last_contiguous("weight", weight)


def _check_layout(check: Checker, name: str, tensor) -> None:
    """Checks for a dtype that panels can have."""
    check.tensor(name, tensor)
    if tensor.dtype not in (*FLOATS, torch.int8):
        check.fail(name, "float32, float16, bfloat16 or int8", dtype_name(tensor.dtype), TypeError)


def _check_pack(weight, panels) -> None:
    check = Checker("pack_linear")
    _check_layout(check, "weight", weight)
    check.dims("weight", weight, 2)
    check.last_contiguous("weight", weight)
    check.dtype_as("panels", panels, "weight", weight)
    _check_panels(check, panels, weight.dtype, *weight.shape)


def _check_unpack(panels, out_features, in_features, outputs=None) -> None:
    check = Checker("unpack_linear")
    _check_layout(check, "panels", panels)
    _check_size(check, "out_features", out_features)
    _check_size(check, "in_features", in_features)
    _check_panels(check, panels, panels.dtype, out_features, in_features)
    if outputs is not None:
        check.index("outputs", outputs, None, panels.device)


@torch.library.register_fake("baton_kernels::linear_packed")
def _fake_linear(x, panels, out_features, bias=None):
    _check_linear(x, panels, out_features, bias)
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("baton_kernels::linear_packed.int8")
def _fake_linear_int8(x, panels, scales, out_features, bias=None):
    _check_linear_int8(x, panels, scales, out_features, bias)
    return x.new_empty((x.shape[0], out_features))


@torch.library.register_fake("baton_kernels::quantize_linear")
def _fake_quantize(weight):
    _check_quantize(weight)
    return weight.new_empty(weight.shape, dtype=torch.int8), weight.new_empty(
        weight.shape[0], dtype=torch.float32
    )


@torch.library.register_fake("baton_kernels::pack_linear")
def _fake_pack(weight, panels):
    _check_pack(weight, panels)


@torch.library.register_fake("baton_kernels::unpack_linear")
def _fake_unpack(panels, out_features, in_features, outputs=None):
    _check_unpack(panels, out_features, in_features, outputs)
    rows = out_features if outputs is None else outputs.shape[0]
    return panels.new_empty((rows, in_features))
