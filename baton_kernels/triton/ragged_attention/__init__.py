"""ragged_attention in Triton: the plan of work and the launches; kernels in kernels.py.

The query vectors of a row and KV head are its tokens times the heads that share the KV head. A row
with few of them (decode) is read in splits of its columns, whose partial results a second
kernel merges in column order; a row with many (prefill) in tiles of vectors. Which of the two, the
shape of the tiles and the ends of the splits depend only on the row's own lengths and on the
model: that makes a row's bits independent of its batch. All bounds of the launches are known to the
host; nothing is read back from the device.
"""

from __future__ import annotations

import torch

from baton_kernels.ops.checks import default_cu_seqlens, default_slots, default_starts
from baton_kernels.ops.ragged_attention import check_arguments, check_out_arguments
from baton_kernels.triton import common
from baton_kernels.triton.ragged_attention.kernels import (
    attend_few_kernel,
    attend_many_kernel,
    merge_splits_kernel,
)

# A split is long enough that reading its columns hides writing and merging its partial result; the
# number of splits bounds the partial results, however long the cache.
SPLIT_COLUMNS, MAX_SPLITS = 512, 64
# Tensor cores multiply 16 vectors or more at a time.
MIN_BLOCK_M = 16
LOG2_E = 1.4426950408889634
# No row is longer; larger windows would only overflow int32.
MAX_WINDOW = 2**30


def tile(head_dim: int, itemsize: int, units: str) -> tuple[int, int, int, int]:
    """Query vectors of a tile of many, keys of a step, warps, pipeline stages.

    The largest that neither spill nor pass the shared memory on any architecture of their kind
    (tests/triton/test_triton_compile.py). Fixed, never tuned at run time: bits depend on them.
    """
    if units == "rdna":
        # A second stage in flight does not fit in the registers of a warp of 32 threads.
        if itemsize == 4:
            return 16, 16, 16, 1
        if head_dim <= 128:
            return 64, 32, 8, 1
        return 32, 16, 8, 1
    if itemsize == 4 or units == "none":
        # Both factors of a product pass through registers.
        if itemsize == 4 and head_dim > 128:
            return 16, 16, 8, 1
        return (32 if head_dim <= 64 else 16), 32, 8, 2
    if units == "matrix":
        return 64, (64 if head_dim <= 64 else 32), (4 if head_dim <= 128 else 8), 2
    raise ValueError(f"ragged_attention: units must be matrix, rdna or none, got {units}")


def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    out: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    max_query_length: int | None = None,
    max_length: int | None = None,
    block_table: torch.Tensor | None = None,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`baton_kernels.ragged_attention` in Triton."""
    arguments = (
        query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, scale, causal, window,
        softcap, alibi_slopes, sinks, max_query_length, max_length, block_table, key_scale,
        value_scale,
    )  # fmt: skip
    if out is None:
        return run_lse(*arguments) if return_lse else run_options(*arguments)
    if isinstance(out, tuple):
        run_lse_out(*arguments, out=out[0], lse=out[1])
    else:
        run_out(*arguments, out=out)
    return out


def run_options(query, *args, **options) -> torch.Tensor:
    """Returns the same as torch.ops.baton_kernels.ragged_attention and its overload `options`."""
    check_arguments(query, *args, **options, in_triton=True)
    out = query.new_empty(query.shape)
    _attend(out, None, query, *args, **options)
    return out


run = run_options


def run_lse(query, *args, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the same as torch.ops.baton_kernels.ragged_attention.lse."""
    check_arguments(query, *args, **options, in_triton=True)
    out = query.new_empty(query.shape)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    _attend(out, lse, query, *args, **options)
    return out, lse


def run_out(*args, out) -> None:
    """Does the same as torch.ops.baton_kernels.ragged_attention.out."""
    check_out_arguments(*args, out=out, in_triton=True)
    _attend(out, None, *args)


def run_lse_out(*args, out, lse) -> None:
    """Does the same as torch.ops.baton_kernels.ragged_attention.lse_out."""
    check_out_arguments(*args, out=out, lse=lse, in_triton=True)
    _attend(out, lse, *args)


def _attend(
    out, lse, query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths,
    scale=None, causal=True, window=None, softcap=0.0, alibi_slopes=None, sinks=None,
    max_query_length=None, max_length=None, block_table=None, key_scale=None, value_scale=None,
) -> None:  # fmt: skip
    """Writes out, and lse if there is one. The checks have refused scales."""
    common.require_gpu("ragged_attention", "query", query)
    total_queries, num_heads, head_dim = query.shape
    num_slots, num_kv_heads, capacity, _ = key_cache.shape
    # Columns of a slot, or of a page.
    page = capacity
    if block_table is not None:
        capacity, slots = block_table.shape[1] * page, None
    rows, group = lengths.shape[0], num_heads // num_kv_heads
    if total_queries == 0 or rows == 0:
        return
    cu_seqlens_q = default_cu_seqlens(cu_seqlens_q, rows, query.device)
    if block_table is None:
        slots = default_slots(slots, rows, query.device)
    starts = default_starts(starts, rows, query.device)

    units = common.dot_units(query.device)
    few = max(MIN_BLOCK_M, common.power_of_2(group))
    block_m, block_n, num_warps, num_stages = tile(head_dim, query.element_size(), units)
    few_block_m = min(few, block_m)
    # Long heads fill the registers of a warp of 32 threads on AMD.
    is_full = units == "rdna" and head_dim > 128
    # 4 warps do for a tile that is a quarter as tall.
    few_warps = 4 if few_block_m < block_m and not is_full else num_warps
    few_tiles = few // few_block_m
    longest = capacity if max_length is None else min(max_length, capacity)
    longest_query = total_queries if max_query_length is None else max_query_length
    splits = min(max(common.ceil_div(longest, SPLIT_COLUMNS), 1), MAX_SPLITS)
    if scale is None:
        scale = head_dim**-0.5
    constants = {
        "SPLIT_COLUMNS": SPLIT_COLUMNS,
        "MAX_SPLITS": MAX_SPLITS,
        "GROUP": group,
        "FEW": few,
        "HEAD_DIM": head_dim,
        "BLOCK_D": common.power_of_2(head_dim),
        "HAS_LSE": lse is not None,
    }
    table_args = (block_table, 0 if block_table is None else block_table.stride(0))
    options = {
        "IS_CAUSAL": causal,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap > 0,
        # Tokens of one row may meet in a tile, and not see the same keys.
        "HAS_HIDDEN": longest_query > 1 and (causal or window is not None),
        "BLOCK_N": block_n,
        # Whether steps share what they have in common, the query among it, in registers.
        "HOIST": not is_full,
        "PAGE": 0 if block_table is None else page,
        "num_stages": num_stages,
    }
    rows_args = (
        cu_seqlens_q, slots, starts, lengths, alibi_slopes, sinks,
        *table_args, rows, total_queries, num_kv_heads, num_slots, capacity,
        *query.stride()[:2], *key_cache.stride()[:3], *value_cache.stride()[:3],
        # exp and log are taken to base 2, which is what GPUs have; scores carry the factor.
        scale / softcap if softcap > 0 else scale * LOG2_E, softcap * LOG2_E,
        0 if window is None else min(window, MAX_WINDOW),
    )  # fmt: skip

    planes = (rows, num_kv_heads, splits if splits > 1 else 0, few)
    sums = query.new_empty((*planes, head_dim), dtype=torch.float32)
    peaks = query.new_empty((*planes, 2), dtype=torch.float32)
    common.launch(
        attend_few_kernel, rows * num_kv_heads * few_tiles * splits, query.device,
        query, key_cache, value_cache, out, lse, sums, peaks, splits, *rows_args,
        BLOCK_M=few_block_m, num_warps=few_warps, **constants, **options,
    )  # fmt: skip
    if splits > 1:
        common.launch(
            merge_splits_kernel, rows * num_kv_heads * few_tiles, query.device,
            out, lse, sums, peaks, cu_seqlens_q, slots, starts, lengths, sinks,
            splits, total_queries, num_kv_heads, num_slots, capacity,
            BLOCK_M=few_block_m, BLOCK_N=block_n, **constants,
        )  # fmt: skip

    # Rows with many vectors: how many tiles they have at most, given what the host knows.
    if longest_query * group > few:
        many_rows = min(rows, total_queries * group // (few + 1))
        tiles = total_queries * group // block_m + many_rows
        tiles = min(tiles, rows * common.ceil_div(longest_query * group, block_m))
        common.launch(
            attend_many_kernel, tiles * num_kv_heads, query.device,
            query, key_cache, value_cache, out, lse, *rows_args, tiles,
            BLOCK_M=block_m, num_warps=num_warps, **constants, **options,
        )  # fmt: skip
