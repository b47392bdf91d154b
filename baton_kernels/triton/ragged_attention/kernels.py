"""The kernels of ragged_attention; ragged_attention.py says which row runs in which."""

import triton
import triton.language as tl

from baton_kernels.triton.common import narrow, operand, tanh
from baton_kernels.triton.ragged_attention.pieces import next_piece, vectors_of_piece

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Rows whose lengths are looked at together, when a program looks for its row.
ROWS = tl.constexpr(64)


@triton.jit
def _load_row(row, cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, total_queries, num_slots,
              capacity):  # fmt: skip
    """First query token, their number, slot, start and length. A row out of range has length 0.

    With a block table there are no slots, and `capacity` is the number of columns of a row.
    """
    first = tl.load(cu_seqlens_ptr + row)
    last = tl.load(cu_seqlens_ptr + row + 1)
    first = tl.minimum(tl.maximum(first, 0), total_queries)
    last = tl.minimum(tl.maximum(last, first), total_queries)
    start = tl.load(starts_ptr + row)
    length = tl.load(lengths_ptr + row)
    is_valid = (start >= 0) & (length >= 0) & (length <= capacity) & (start <= capacity - length)
    slot = tl.zeros_like(start)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row)
        is_valid &= (slot >= 0) & (slot < num_slots)
    slot = tl.where(is_valid, slot, 0).to(tl.int64)
    start = tl.where(is_valid, start, 0).to(tl.int64)
    return first, last - first, slot, start, tl.where(is_valid, length, 0)


@triton.jit
def _split_plan(length, SPLIT_COLUMNS: tl.constexpr, MAX_SPLITS: tl.constexpr,
                BLOCK_N: tl.constexpr):  # fmt: skip
    """Number of splits and columns of one, from a row's own length only."""
    num_splits = tl.minimum(tl.maximum(tl.cdiv(length, SPLIT_COLUMNS), 1), MAX_SPLITS)
    columns = tl.cdiv(tl.cdiv(length, num_splits), BLOCK_N) * BLOCK_N
    return num_splits, columns


@triton.jit
def _row_of_cache(cache_ptr, slot, kv_head, start, slot_stride, head_stride, column_stride,
                  PAGE: tl.constexpr):  # fmt: skip
    """Where a row's keys or values begin; with pages, column 0 of page 0."""
    row_ptr = cache_ptr + slot * slot_stride + kv_head * head_stride
    if PAGE == 0:
        row_ptr += start * column_stride
    return row_ptr


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, alibi_ptr,  # of the cache: _row_of_cache
    pages_ptr, start, num_slots,  # the row's pages; not looked at without
    token, head, is_vector, position,  # [BLOCK_M]
    begin, end,  # keys of this program
    query_token_stride, query_head_stride, key_slot_stride, key_column_stride,
    value_slot_stride, value_column_stride, score_scale, softcap, window,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HOIST: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and weighted values of keys [begin, end); scores to base 2."""
    d = tl.arange(0, BLOCK_D)
    in_head = (d < HEAD_DIM)[None, :]
    query_at = token * query_token_stride + head * query_head_stride
    query = tl.load(
        query_ptr + query_at[:, None] + d[None, :], mask=is_vector[:, None] & in_head, other=0.0
    )
    if alibi_ptr is not None:
        slope = tl.load(alibi_ptr + head, mask=is_vector, other=0.0) * LOG2_E

    # Keys that none of these tokens sees are not read. Steps begin at multiples of BLOCK_N from the
    # row's first key: which keys meet in a step depends on the row only.
    if IS_CAUSAL:
        end = tl.minimum(end, tl.max(position, 0) + 1)
    if HAS_WINDOW:
        oldest = tl.min(tl.where(is_vector, position, 0x7FFFFFFF), 0) - window + 1
        begin = tl.maximum(begin, tl.maximum(oldest, 0) // BLOCK_N * BLOCK_N)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for at in tl.range(begin, end, BLOCK_N, disable_licm=not HOIST):
        key_position = at + tl.arange(0, BLOCK_N)
        inside = key_position < end
        if HAS_WINDOW:
            inside &= key_position >= oldest
        column = key_position.to(tl.int64)
        if PAGE == 0:
            mask = inside[:, None] & in_head
            key_at = (column * key_column_stride)[:, None]
            value_at = (column * value_column_stride)[:, None]
        else:
            column += start
            page = tl.load(pages_ptr + column // PAGE, mask=inside, other=0).to(tl.int64)
            # A page out of range is not read.
            mask = (inside & (page >= 0) & (page < num_slots))[:, None] & in_head
            column %= PAGE
            key_at = (page * key_slot_stride + column * key_column_stride)[:, None]
            value_at = (page * value_slot_stride + column * value_column_stride)[:, None]
        # Padding is not loaded: the lanes beyond the end hold zeros, not what stands there.
        key = tl.load(key_ptr + key_at + d[None, :], mask=mask, other=0.0)
        score = tl.dot(operand(query), tl.trans(operand(key)), input_precision="ieee") * score_scale
        if HAS_SOFTCAP:
            score = softcap * tanh(score)
        distance = position[:, None] - key_position[None, :]
        if alibi_ptr is not None:
            score -= slope[:, None] * tl.abs(distance).to(tl.float32)
        visible = inside[None, :] & (position >= 0)[:, None]
        if IS_CAUSAL:
            visible &= distance >= 0
        if HAS_WINDOW:
            visible &= distance < window
        score = tl.where(visible, score, float("-inf"))

        higher = tl.maximum(peak, tl.max(score, 1))
        # Where nothing has been visible yet, subtracting 0 makes every weight 0, not NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        fade = tl.exp2(peak - base)
        total = tl.fma(total, fade, tl.sum(weight, 1))
        peak = higher
        value = tl.load(value_ptr + value_at + d[None, :], mask=mask, other=0.0)
        weight = operand(narrow(weight, value_ptr.dtype.element_ty))
        out = tl.dot(weight, operand(value), out * fade[:, None], input_precision="ieee")
    return peak, total, out


@triton.jit
def _finish(
    out_ptr, lse_ptr, sinks_ptr, token, head, is_vector, position, num_heads, peak, total, out,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Normalizes, with the sink as one more logit that has no value, and writes the result.

    Only a position below 0 sees nothing. Where all scores are -inf the total is 0 without a sink,
    and the result NaN, as of torch.softmax.
    """
    lse_at = token * num_heads + head
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=is_vector, other=float("-inf"))
        top = tl.maximum(peak, sink * LOG2_E)
        base = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp2(peak - base)
        total = tl.fma(total, fade, tl.exp2(sink * LOG2_E - base))
        out *= fade[:, None]
    else:
        base = tl.where(peak == float("-inf"), 0.0, peak)
    sees = position >= 0
    if HAS_LSE:
        is_empty = total == 0.0
        lse = (base + tl.log2(tl.where(is_empty, 1.0, total))) * LN_2
        lse = tl.where(is_empty, float("-inf"), lse)
        if sinks_ptr is not None:
            # Exactly the sink, without a way through base 2; a NaN score has left its own total.
            lse = tl.where((peak == float("-inf")) & (total == total), sink, lse)
        tl.store(lse_ptr + lse_at, lse, mask=is_vector)
    d = tl.arange(0, BLOCK_D)
    # Adding 0 turns -0 into the 0 that it is among hidden keys, which add 0 times their values.
    out = tl.where(sees[:, None], out / tl.where(sees, total, 1.0)[:, None] + 0.0, 0.0)
    tl.store(
        out_ptr + lse_at[:, None] * HEAD_DIM + d[None, :],
        narrow(out, out_ptr.dtype.element_ty),
        mask=is_vector[:, None] & (d < HEAD_DIM)[None, :],
    )


@triton.jit(do_not_specialize=["splits", "rows", "total_queries", "num_slots", "window",
                                "block_table_stride"])  # fmt: skip
def attend_few_kernel(
    query_ptr, key_cache_ptr, value_cache_ptr,  # [queries, heads, D], [slots, KV, capacity, D]
    out_ptr, lse_ptr,  # [queries, heads, D], [queries, heads]
    sums_ptr, peaks_ptr,  # [rows, KV, splits, FEW, D], [..., 2]: partial results
    splits,
    cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, alibi_ptr, sinks_ptr,
    block_table_ptr, block_table_stride,  # [rows, max_pages] of PAGE columns, in place of slots
    rows, total_queries, num_kv_heads, num_slots, capacity,
    query_token_stride, query_head_stride, key_slot_stride, key_head_stride, key_column_stride,
    value_slot_stride, value_head_stride, value_column_stride, score_scale, softcap, window,
    BLOCK_M: tl.constexpr, SPLIT_COLUMNS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr, FEW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """One split of a row of at most FEW query vectors per KV head."""
    TILES: tl.constexpr = FEW // BLOCK_M
    # At most this many tokens have vectors in a tile.
    TOKENS: tl.constexpr = (BLOCK_M - 1) // GROUP + 2
    piece, piece_end = 0, TOKENS + 1
    # Nearly always one turn has work. What turns have in common is computed in each: registers that
    # kept it from one to the next are needed for sums.
    for _ in tl.range(0, TOKENS + 1 if HAS_HIDDEN else 1, disable_licm=True):
        if piece < TOKENS:
            program = tl.program_id(0)
            split = program % splits
            tile = program // splits % TILES
            kv_head = (program // splits // TILES % num_kv_heads).to(tl.int64)
            row = (program // splits // TILES // num_kv_heads).to(tl.int64)
            first, count, slot, start, length = _load_row(
                row, cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, total_queries, num_slots,
                capacity,
            )  # fmt: skip
            num_splits, columns = _split_plan(length, SPLIT_COLUMNS, MAX_SPLITS, BLOCK_N)
            vectors = count * GROUP
            if (vectors <= FEW) & (tile * BLOCK_M < vectors) & (split < num_splits):
                begin = split * columns
                end = tl.minimum(begin + columns, length)
                vector, token, head, is_vector, position = vectors_of_piece(
                    piece, piece_end, first, count, length, kv_head, tile, GROUP, BLOCK_M
                )
                key_ptr = _row_of_cache(key_cache_ptr, slot, kv_head, start, key_slot_stride,
                                        key_head_stride, key_column_stride, PAGE)  # fmt: skip
                value_ptr = _row_of_cache(value_cache_ptr, slot, kv_head, start, value_slot_stride,
                                          value_head_stride, value_column_stride, PAGE)  # fmt: skip
                pages_ptr = block_table_ptr + row * block_table_stride if PAGE > 0 else None
                peak, total, out = _attend(
                    query_ptr, key_ptr, value_ptr, alibi_ptr, pages_ptr, start, num_slots, token,
                    head, is_vector, position, begin, end, query_token_stride,
                    query_head_stride, key_slot_stride, key_column_stride, value_slot_stride,
                    value_column_stride, score_scale, softcap, window, IS_CAUSAL, HAS_WINDOW,
                    HAS_SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HOIST, PAGE,
                )  # fmt: skip
                if num_splits == 1:
                    _finish(out_ptr, lse_ptr, sinks_ptr, token, head, is_vector, position,
                            num_kv_heads * GROUP, peak, total, out, HEAD_DIM, BLOCK_D,
                            HAS_LSE)  # fmt: skip
                else:
                    d = tl.arange(0, BLOCK_D)
                    at = ((row * num_kv_heads + kv_head) * splits + split) * FEW + vector
                    tl.store(peaks_ptr + at * 2, peak, mask=is_vector)
                    tl.store(peaks_ptr + at * 2 + 1, total, mask=is_vector)
                    tl.store(sums_ptr + at[:, None] * HEAD_DIM + d[None, :], out,
                             mask=is_vector[:, None] & (d < HEAD_DIM)[None, :])  # fmt: skip
                if HAS_HIDDEN:
                    piece, piece_end = next_piece(
                        piece_end, out, count, length, tile, value_ptr, pages_ptr, start, num_slots,
                        begin, end, value_slot_stride, value_column_stride, window, TOKENS,
                        IS_CAUSAL, HAS_WINDOW, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PAGE,
                    )  # fmt: skip
            else:
                piece = TOKENS


@triton.jit(do_not_specialize=["splits", "total_queries", "num_slots"])
def merge_splits_kernel(
    out_ptr, lse_ptr, sums_ptr, peaks_ptr,
    cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, sinks_ptr,
    splits, total_queries, num_kv_heads, num_slots, capacity,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT_COLUMNS: tl.constexpr,
    MAX_SPLITS: tl.constexpr, GROUP: tl.constexpr, FEW: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """Merges the splits of a row's tile, in column order."""
    TILES: tl.constexpr = FEW // BLOCK_M
    tile = tl.program_id(0) % TILES
    kv_head = (tl.program_id(0) // TILES % num_kv_heads).to(tl.int64)
    row = (tl.program_id(0) // TILES // num_kv_heads).to(tl.int64)
    first, count, slot, start, length = _load_row(
        row, cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, total_queries, num_slots, capacity
    )
    num_splits, columns = _split_plan(length, SPLIT_COLUMNS, MAX_SPLITS, BLOCK_N)
    vectors = count * GROUP
    if (vectors > FEW) | (tile * BLOCK_M >= vectors) | (num_splits == 1):
        return
    vector = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_vector = vector < vectors
    d = tl.arange(0, BLOCK_D)
    mask = is_vector[:, None] & (d < HEAD_DIM)[None, :]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # A row longer than the bound that the caller gave has more splits than there is room for.
    for split in range(0, tl.minimum(num_splits, splits)):
        at = ((row * num_kv_heads + kv_head) * splits + split) * FEW + vector
        split_peak = tl.load(peaks_ptr + at * 2, mask=is_vector, other=float("-inf"))
        split_total = tl.load(peaks_ptr + at * 2 + 1, mask=is_vector, other=0.0)
        split_out = tl.load(sums_ptr + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(peak, split_peak)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp2(peak - base)
        split_fade = tl.exp2(split_peak - base)
        total = tl.fma(total, fade, split_total * split_fade)
        out = tl.fma(out, tl.broadcast_to(fade[:, None], [BLOCK_M, BLOCK_D]),
                     split_out * split_fade[:, None])  # fmt: skip
        peak = higher
    _finish(out_ptr, lse_ptr, sinks_ptr, (first + vector // GROUP).to(tl.int64),
            kv_head * GROUP + vector % GROUP, is_vector,
            tl.where(is_vector, length - count + vector // GROUP, -1), num_kv_heads * GROUP,
            peak, total, out, HEAD_DIM, BLOCK_D, HAS_LSE)  # fmt: skip


@triton.jit
def _find_tile(tile, cu_seqlens_ptr, rows, GROUP: tl.constexpr, FEW: tl.constexpr,
               BLOCK_M: tl.constexpr):  # fmt: skip
    """Row (-1 if there is none) and tile within it, counting the tiles of rows with many."""
    row = tl.full([], -1, tl.int32)
    within = tl.full([], 0, tl.int32)
    seen = tl.full([], 0, tl.int32)
    for base in range(0, rows, ROWS):
        i = base + tl.arange(0, ROWS)
        is_row = i < rows
        first = tl.load(cu_seqlens_ptr + i, mask=is_row, other=0)
        last = tl.load(cu_seqlens_ptr + i + 1, mask=is_row, other=0)
        vectors = (last - first) * GROUP
        tiles = tl.where(vectors > FEW, tl.cdiv(vectors, BLOCK_M), 0)
        through = seen + tl.cumsum(tiles, 0)
        is_here = (through > tile) & (through - tiles <= tile)
        row += tl.sum(tl.where(is_here, i + 1, 0), 0)
        # The last tile of a causal row reads most: first, so that no processor ends with it.
        within += tl.sum(tl.where(is_here, through - 1 - tile, 0), 0)
        seen += tl.sum(tiles, 0)
    return tl.minimum(row, rows - 1), within


@triton.jit(do_not_specialize=["rows", "total_queries", "num_slots", "window", "tiles",
                                "block_table_stride"])  # fmt: skip
def attend_many_kernel(
    query_ptr, key_cache_ptr, value_cache_ptr,  # [queries, heads, D], [slots, KV, capacity, D]
    out_ptr, lse_ptr,  # [queries, heads, D], [queries, heads]
    cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, alibi_ptr, sinks_ptr,
    block_table_ptr, block_table_stride,  # [rows, max_pages] of PAGE columns, in place of slots
    rows, total_queries, num_kv_heads, num_slots, capacity,
    query_token_stride, query_head_stride, key_slot_stride, key_head_stride, key_column_stride,
    value_slot_stride, value_head_stride, value_column_stride, score_scale, softcap, window, tiles,
    BLOCK_M: tl.constexpr, SPLIT_COLUMNS: tl.constexpr, MAX_SPLITS: tl.constexpr,
    GROUP: tl.constexpr, FEW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_LSE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_HIDDEN: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """One tile of a row of more than FEW query vectors per KV head, over all its keys."""
    TOKENS: tl.constexpr = (BLOCK_M - 1) // GROUP + 2
    piece, piece_end = 0, TOKENS + 1
    # As in attend_few_kernel.
    for _ in tl.range(0, TOKENS + 1 if HAS_HIDDEN else 1, disable_licm=True):
        if piece < TOKENS:
            found, tile = _find_tile(
                tl.program_id(0) % tiles, cu_seqlens_ptr, rows, GROUP, FEW, BLOCK_M
            )
            if found >= 0:
                row = found.to(tl.int64)
                kv_head = (tl.program_id(0) // tiles).to(tl.int64)
                first, count, slot, start, length = _load_row(
                    row, cu_seqlens_ptr, slots_ptr, starts_ptr, lengths_ptr, total_queries,
                    num_slots, capacity,
                )  # fmt: skip
                vector, token, head, is_vector, position = vectors_of_piece(
                    piece, piece_end, first, count, length, kv_head, tile, GROUP, BLOCK_M
                )
                key_ptr = _row_of_cache(key_cache_ptr, slot, kv_head, start, key_slot_stride,
                                        key_head_stride, key_column_stride, PAGE)  # fmt: skip
                value_ptr = _row_of_cache(value_cache_ptr, slot, kv_head, start, value_slot_stride,
                                          value_head_stride, value_column_stride, PAGE)  # fmt: skip
                pages_ptr = block_table_ptr + row * block_table_stride if PAGE > 0 else None
                peak, total, out = _attend(
                    query_ptr, key_ptr, value_ptr, alibi_ptr, pages_ptr, start, num_slots, token,
                    head, is_vector, position, 0, length, query_token_stride,
                    query_head_stride, key_slot_stride, key_column_stride, value_slot_stride,
                    value_column_stride, score_scale, softcap, window, IS_CAUSAL, HAS_WINDOW,
                    HAS_SOFTCAP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, HOIST, PAGE,
                )  # fmt: skip
                _finish(out_ptr, lse_ptr, sinks_ptr, token, head, is_vector, position,
                        num_kv_heads * GROUP, peak, total, out, HEAD_DIM, BLOCK_D,
                        HAS_LSE)  # fmt: skip
                if HAS_HIDDEN:
                    piece, piece_end = next_piece(
                        piece_end, out, count, length, tile, value_ptr, pages_ptr, start, num_slots,
                        0, length, value_slot_stride, value_column_stride, window, TOKENS,
                        IS_CAUSAL, HAS_WINDOW, GROUP, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PAGE,
                    )  # fmt: skip
            else:
                piece = TOKENS
