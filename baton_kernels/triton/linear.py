"""linear in Triton: the bits of a row do not depend on how many rows there are.

Every output is a sum over the splits of in_features, in their order, and each split a sum in the
order of in_features. The splits follow from the weight's shape only. Few rows read the weights
once, with all the bytes in flight that the shared memory holds: a program per split, whose sums a
second launch adds up. Many rows take larger tiles, which do the same additions in one program. The
weight is the left factor of each product, so that all tiles use the same matrix instructions.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from baton_kernels.ops.linear import check_arguments
from baton_kernels.ops.packed_weight import PackedWeight
from baton_kernels.triton import common
from baton_kernels.triton.common import narrow, operand, widen

# Outputs of a tile for few rows: the least that sm_90's and sm_100's larger matrix instructions
# take. A tile of fewer would use others there, whose bits may differ.
FEW_OUT = 64
# Rows of a tile for few rows: the least that a product takes, and what doubles its shared memory.
FEW_ROWS = (16, 64)
MANY_OUT, MANY_ROWS = 128, 64
# The sums of a split and of all fit in the registers for twice the rows where the matrix units read
# both factors from the shared memory: on the GPUs that have this much of it (sm_90, sm_100).
LARGE_SHARED, MOST_ROWS = 200 << 10, 128
# in_features of a step. Without matrix units both factors pass through registers: fewer fit.
BLOCK_IN, SHORT_BLOCK_IN = 64, 16
# Larger tiles are chosen where there are this many of them: one for nearly every multiprocessor of
# the GPUs that have the most (132 to 148).
ENOUGH_MANY = 128
# A weight with fewer tiles of outputs is split until there are this many programs, while a split
# has LEAST_SPLIT in_features.
ENOUGH_FEW, MOST_SPLITS, LEAST_SPLIT = 192, 8, 256
# Bytes of the weight that one program has in flight, if the shared memory allows; enough for the
# bandwidth of an H100 with one program per multiprocessor: 3.35 TB/s x 2 us / 132.
IN_FLIGHT = 64 << 10
MERGE_ROWS, MERGE_OUT = 4, 512


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a product is computed.

    Attributes:
        many: whether by the larger tiles.
        out, rows, step: of a tile: outputs, rows, in_features of a step.
        splits: of in_features, and `split` in_features in each.
        stages: steps whose loads are in flight or in use.
        programs: of the product; those of the second launch follow if `merges`.
        shared: bytes of a program.
        flight: bytes of the weight that a program has in flight.
    """

    many: bool
    out: int
    rows: int
    step: int
    splits: int
    split: int
    stages: int
    programs: int
    shared: int
    flight: int

    @property
    def merges(self) -> bool:
        """Whether a second launch adds up the splits."""
        return not self.many and self.splits > 1


def splits_of(out_features: int, in_features: int) -> int:
    """Number of splits of in_features, a function of the weight's shape only."""
    tiles, splits = common.ceil_div(out_features, FEW_OUT), 1
    while (
        tiles * splits < ENOUGH_FEW
        and splits < MOST_SPLITS
        and in_features >= 2 * splits * LEAST_SPLIT
    ):
        splits *= 2
    return splits


def plan(
    rows: int, out_features: int, in_features: int, itemsize: int, units: str, shared: int
) -> Plan:
    """The plan for a product.

    Args:
        rows: of x.
        out_features, in_features: of the weight.
        itemsize: bytes of an element.
        units: as `common.dot_units` says.
        shared: bytes of shared memory that a program may have.
    """
    in_registers = itemsize == 4 or units == "none"
    step = SHORT_BLOCK_IN if in_registers else BLOCK_IN
    splits = splits_of(out_features, in_features)
    # Whole steps, so that no step belongs to two splits.
    split = common.ceil_div(common.ceil_div(in_features, splits), BLOCK_IN) * BLOCK_IN
    many_rows = MOST_ROWS if shared >= LARGE_SHARED else MANY_ROWS
    tiles = common.ceil_div(rows, many_rows) * common.ceil_div(out_features, MANY_OUT)
    # A wide weight has enough larger tiles for one row too, which would be mostly empty.
    many = rows > FEW_ROWS[-1] and tiles >= ENOUGH_MANY and not in_registers and units == "matrix"
    if many:
        out, height = MANY_OUT, many_rows
    else:
        out, height = FEW_OUT, FEW_ROWS[rows > FEW_ROWS[0]]
        row_tiles = common.ceil_div(rows, height)
        tiles = row_tiles * common.ceil_div(out_features, out) * splits
    weight, x = out * step * itemsize, height * step * itemsize
    wanted = 4 if many else common.ceil_div(IN_FLIGHT, weight) + 1
    stages = max(2, min(wanted, shared // (weight + x))) if not in_registers else 3
    return Plan(
        many, out, height, step, splits, split, stages, tiles, stages * (weight + x),
        (stages - 1) * weight,
    )  # fmt: skip


def resident(p: Plan, shared: int) -> int:
    """Programs of a plan that a multiprocessor holds at a time, by its shared memory."""
    return max(1, shared // max(1, p.shared))


def linear(
    x: torch.Tensor, weight: torch.Tensor | PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`baton_kernels.linear` in Triton, whose kernels read a weight as it is."""
    return run(x, weight.unpack() if isinstance(weight, PackedWeight) else weight, bias)


def run(x, weight, bias=None) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.linear."""
    check_arguments(x, weight, bias)
    common.require_gpu("linear", "x", x)
    rows, in_features = x.shape
    out_features = weight.shape[0]
    y = x.new_empty((rows, out_features))
    if y.numel() == 0:
        return y
    p = plan(
        rows, out_features, in_features, x.element_size(), common.dot_units(x.device),
        common.shared_bytes(x.device),
    )  # fmt: skip
    sums = y
    if p.merges:
        sums = x.new_empty((p.splits, rows, out_features), dtype=torch.float32)
    common.launch(
        many_rows_kernel if p.many else few_rows_kernel, p.programs, x.device,
        x, weight, bias, sums, rows, out_features, in_features, x.stride(0), weight.stride(0),
        SPLITS=p.splits, SPLIT=p.split, BLOCK_ROWS=p.rows, BLOCK_OUT=p.out, BLOCK_IN=p.step,
        num_stages=p.stages, num_warps=8 if p.many else 4,
    )  # fmt: skip
    if p.merges:
        programs = common.ceil_div(rows, MERGE_ROWS) * common.ceil_div(out_features, MERGE_OUT)
        common.launch(
            add_splits_kernel, programs, x.device, sums, bias, y, rows, out_features,
            SPLITS=p.splits, BLOCK_ROWS=MERGE_ROWS, BLOCK_OUT=MERGE_OUT,
        )  # fmt: skip
    return y


@triton.jit
def _split_sum(
    x_ptr, weight_ptr, row, out, is_row, is_out, begin, in_features, x_row_stride,
    weight_row_stride, SPLIT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """[outputs, rows]: the products of in_features from begin to begin + SPLIT, in their order."""
    lane = tl.arange(0, BLOCK_IN)
    total = tl.zeros([BLOCK_OUT, BLOCK_ROWS], tl.float32)
    weight_rows = weight_ptr + out[:, None] * weight_row_stride
    x_rows = x_ptr + row[:, None] * x_row_stride
    end = tl.minimum(begin + SPLIT, in_features)
    for first in range(begin, end, BLOCK_IN):
        at = first + lane[None, :]
        is_in = at < in_features
        weight = tl.load(weight_rows + at, mask=is_out[:, None] & is_in, other=0.0)
        x = tl.load(x_rows + at, mask=is_row[:, None] & is_in, other=0.0)
        total = tl.dot(operand(weight), tl.trans(operand(x)), total, input_precision="ieee")
    return total


@triton.jit
def _store(y_ptr, bias_ptr, total, row, out, is_row, is_out, out_features):
    if bias_ptr is not None:
        total += widen(tl.load(bias_ptr + out, mask=is_out, other=0.0))[:, None]
    to = row[None, :] * out_features + out[:, None]
    tl.store(y_ptr + to, narrow(total, y_ptr.dtype.element_ty), is_out[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["rows"])
def few_rows_kernel(
    x_ptr, weight_ptr, bias_ptr,  # [rows, in], [out, in], [out] or None
    sums_ptr,  # float32 [splits, rows, out]; y [rows, out] where there is one split
    rows, out_features, in_features, x_row_stride, weight_row_stride,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    # Row tiles change fastest: the programs that run at one time share their weights.
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rest = tl.program_id(0) // row_tiles
    split = rest % SPLITS
    out = (rest // SPLITS).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = row < rows, out < out_features
    total = _split_sum(
        x_ptr, weight_ptr, row, out, is_row, is_out, split * SPLIT, in_features, x_row_stride,
        weight_row_stride, SPLIT, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    if SPLITS == 1:
        _store(sums_ptr, bias_ptr, total, row, out, is_row, is_out, out_features)
    else:
        to = (split * rows + row[None, :]) * out_features + out[:, None]
        tl.store(sums_ptr + to, total, is_out[:, None] & is_row[None, :])


@triton.jit(do_not_specialize=["rows"])
def add_splits_kernel(
    sums_ptr, bias_ptr, y_ptr,  # float32 [splits, rows, out], [out] or None, [rows, out]
    rows, out_features,
    SPLITS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    out_tiles = tl.cdiv(out_features, BLOCK_OUT)
    row = (tl.program_id(0) // out_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = (tl.program_id(0) % out_tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = row < rows, out < out_features
    mask = is_row[:, None] & is_out[None, :]
    at = row[:, None] * out_features + out[None, :]
    total = tl.load(sums_ptr + at, mask=mask, other=0.0)
    size = rows.to(tl.int64) * out_features
    for split in tl.static_range(1, SPLITS):
        total += tl.load(sums_ptr + split * size + at, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += widen(tl.load(bias_ptr + out, mask=is_out, other=0.0))[None, :]
    tl.store(y_ptr + at, narrow(total, y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def many_rows_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr,  # [rows, in], [out, in], [out] or None, [rows, out]
    rows, out_features, in_features, x_row_stride, weight_row_stride,
    SPLITS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    row = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    out = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = row < rows, out < out_features
    total = _split_sum(
        x_ptr, weight_ptr, row, out, is_row, is_out, 0, in_features, x_row_stride,
        weight_row_stride, SPLIT, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
    )  # fmt: skip
    # The same sums as in add_splits_kernel, in the same order.
    for split in range(1, SPLITS):
        total += _split_sum(
            x_ptr, weight_ptr, row, out, is_row, is_out, split * SPLIT, in_features, x_row_stride,
            weight_row_stride, SPLIT, BLOCK_ROWS, BLOCK_OUT, BLOCK_IN,
        )  # fmt: skip
    _store(y_ptr, bias_ptr, total, row, out, is_row, is_out, out_features)
