"""move_kv in Triton: one program carries a move's columns of one cache, layer and head.

A move may overlap itself, so the program goes block by block away from the side it moves to, and
reads a block whole before it writes it: what it overwrites has been read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton_kernels.ops.checks import default_slots, default_starts
from baton_kernels.ops.move_kv import check_arguments
from baton_kernels.triton import common

# 64 columns x 128 numbers: 8 16-byte accesses per thread are in flight between two barriers.
BLOCK_COLUMNS = 64


def move_kv(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    source_slots: torch.Tensor | None = None,
    source_starts: torch.Tensor | None = None,
    target_slots: torch.Tensor | None = None,
    target_starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> None:
    """`baton_kernels.move_kv` in Triton."""
    common.refuse_scales("move_kv", key_scale, value_scale)
    run(
        key_cache, value_cache, source_slots, source_starts, target_slots, target_starts, lengths
    )  # fmt: skip


def run(
    key_cache, value_cache, source_slots, source_starts, target_slots, target_starts, lengths
) -> None:
    """Does the same as torch.ops.baton_kernels.move_kv."""
    check_arguments(
        key_cache, value_cache, source_slots, source_starts, target_slots, target_starts, lengths
    )  # fmt: skip
    moves = (
        default_slots(source_slots, len(lengths), lengths.device),
        default_starts(source_starts, len(lengths), lengths.device),
        default_slots(target_slots, len(lengths), lengths.device),
        default_starts(target_starts, len(lengths), lengths.device),
        lengths,
    )
    common.require_gpu("move_kv", "key_cache", key_cache)
    num_slots, num_kv_heads, capacity, head_dim = key_cache.shape[-4:]
    num_layers = key_cache.shape[0] if key_cache.dim() == 5 else 1
    common.launch(
        move_kv_kernel, lengths.shape[0] * num_layers * num_kv_heads * 2, key_cache.device,
        key_cache, value_cache, *moves, num_layers, num_kv_heads, num_slots, capacity,
        *common.cache_strides(key_cache), *common.cache_strides(value_cache),
        HEAD_DIM=head_dim, BLOCK_D=common.power_of_2(head_dim), BLOCK_COLUMNS=BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit
def _carry(
    source_ptr, target_ptr, length, shifts_right, column_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    lane = tl.arange(0, BLOCK_COLUMNS)
    blocks = tl.cdiv(length, BLOCK_COLUMNS)
    for i in range(blocks):
        block = tl.where(shifts_right, blocks - 1 - i, i)
        column = block * BLOCK_COLUMNS + lane
        mask = (column < length)[:, None] & (d < HEAD_DIM)[None, :]
        at = column.to(tl.int64)[:, None] * column_stride + d[None, :]
        numbers = tl.load(source_ptr + at, mask=mask)
        # Other threads may still be reading what this one overwrites.
        tl.debug_barrier()
        tl.store(target_ptr + at, numbers, mask=mask)


@triton.jit(do_not_specialize=["num_slots"])
def move_kv_kernel(
    key_cache_ptr, value_cache_ptr,  # [num_layers, num_slots, num_kv_heads, capacity, HEAD_DIM]
    source_slots_ptr, source_starts_ptr, target_slots_ptr, target_starts_ptr, lengths_ptr,
    num_layers, num_kv_heads, num_slots, capacity,
    key_layer_stride, key_slot_stride, key_head_stride, key_column_stride,
    value_layer_stride, value_slot_stride, value_head_stride, value_column_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    is_value = program % 2 == 1
    head = (program // 2 % num_kv_heads).to(tl.int64)
    layer = (program // 2 // num_kv_heads % num_layers).to(tl.int64)
    move = program // 2 // num_kv_heads // num_layers
    source_slot = tl.load(source_slots_ptr + move).to(tl.int64)
    source_start = tl.load(source_starts_ptr + move).to(tl.int64)
    target_slot = tl.load(target_slots_ptr + move).to(tl.int64)
    target_start = tl.load(target_starts_ptr + move).to(tl.int64)
    length = tl.load(lengths_ptr + move)
    outside = (source_slot < 0) | (source_slot >= num_slots)
    outside |= (target_slot < 0) | (target_slot >= num_slots)
    outside |= (source_start < 0) | (source_start + length > capacity)
    outside |= (target_start < 0) | (target_start + length > capacity)
    stays = (source_slot == target_slot) & (source_start == target_start)
    if outside | stays | (length <= 0):
        return
    shifts_right = target_start > source_start
    if is_value:
        plane = value_cache_ptr + layer * value_layer_stride + head * value_head_stride
        _carry(
            plane + source_slot * value_slot_stride + source_start * value_column_stride,
            plane + target_slot * value_slot_stride + target_start * value_column_stride,
            length, shifts_right, value_column_stride, HEAD_DIM, BLOCK_D, BLOCK_COLUMNS,
        )  # fmt: skip
    else:
        plane = key_cache_ptr + layer * key_layer_stride + head * key_head_stride
        _carry(
            plane + source_slot * key_slot_stride + source_start * key_column_stride,
            plane + target_slot * key_slot_stride + target_start * key_column_stride,
            length, shifts_right, key_column_stride, HEAD_DIM, BLOCK_D, BLOCK_COLUMNS,
        )  # fmt: skip
