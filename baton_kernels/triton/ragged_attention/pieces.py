"""Tiles in pieces, so that no token takes in a value that is not finite and hidden from it.

A product makes NaN of a weight of 0, which is that of a key that a token does not see, and a value
that is not finite; and sums keep a NaN. So a tile is one piece first, and if all its sums are
finite, no such value was hidden from anybody. Else it is computed again with care: in pieces of
tokens that see the same of these values, since keys that a piece hides from all of its tokens are
not loaded. Weights, steps and sums of a token are the same in any piece.
"""

import triton
import triton.language as tl

from baton_kernels.triton.common import widen


@triton.jit
def _first_change(
    position, stop,
    value_ptr, pages_ptr, start, num_slots,  # of the cache: _row_of_cache
    begin, end, value_slot_stride, value_column_stride, window,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The first position after this that sees other values that are not finite; at most stop.

    Of keys [begin, end).
    """
    # A key is seen from its own position on, and until the window has passed it. These are the keys
    # for which that changes between position and stop.
    begin = tl.maximum(begin, (position - window if HAS_WINDOW else position) + 1)
    end = tl.minimum(end, stop if IS_CAUSAL else stop - window)
    d = tl.arange(0, BLOCK_D)
    change = stop
    for at in tl.range(begin, end, BLOCK_N, num_stages=1):
        key_position = at + tl.arange(0, BLOCK_N)
        inside = key_position < end
        column = key_position.to(tl.int64)
        if PAGE == 0:
            value_at = column * value_column_stride
        else:
            column += start
            page = tl.load(pages_ptr + column // PAGE, mask=inside, other=0).to(tl.int64)
            inside &= (page >= 0) & (page < num_slots)
            value_at = page * value_slot_stride + column % PAGE * value_column_stride
        value = tl.load(value_ptr + value_at[:, None] + d[None, :],
                        mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # fmt: skip
        is_finite = tl.min((tl.abs(widen(value)) < float("inf")).to(tl.int32), 1)
        changes = key_position
        if HAS_WINDOW:
            changes += window
        if IS_CAUSAL and HAS_WINDOW:
            changes = tl.where(key_position > position, key_position, changes)
        change = tl.minimum(change, tl.min(tl.where(is_finite == 0, changes, stop), 0))
    return change


@triton.jit
def next_piece(
    piece_end, out, count, length, tile,
    value_ptr, pages_ptr, start, num_slots, begin, end, value_slot_stride, value_column_stride,
    window, TOKENS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The piece after one with sums `out` that ends before token `piece_end` of its tile.

    Returns the same two numbers of the next piece: its first token, TOKENS if there is none, and
    the end. The end of the first piece is TOKENS + 1: only it may have to be computed again.
    """
    base = tile * BLOCK_M // GROUP
    tokens = tl.cdiv(tl.minimum((tile + 1) * BLOCK_M, count * GROUP), GROUP) - base
    position = length - count + base
    piece = tl.where(piece_end < tokens, piece_end, TOKENS)
    is_careful = piece_end <= TOKENS
    # A single token has loaded no key that it does not see.
    if (piece_end > TOKENS) & (tokens > 1):
        is_finite = tl.abs(out) < float("inf")
        if tl.min(is_finite.to(tl.int32)) == 0:
            piece = 0
            is_careful = True
    piece_end = TOKENS
    if is_careful & (piece < TOKENS):
        piece_end = _first_change(
            position + piece, position + TOKENS, value_ptr, pages_ptr, start, num_slots, begin, end,
            value_slot_stride, value_column_stride, window, IS_CAUSAL, HAS_WINDOW, HEAD_DIM,
            BLOCK_D, BLOCK_N, PAGE,
        ) - position  # fmt: skip
    return piece, piece_end


@triton.jit
def vectors_of_piece(
    piece, piece_end, first, count, length, kv_head, tile, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """A tile's vectors: index, token, head, whether in the piece, and position (-1 if not)."""
    vector = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    of_tile = vector // GROUP - tile * BLOCK_M // GROUP
    is_vector = (vector < count * GROUP) & (of_tile >= piece) & (of_tile < piece_end)
    token = (first + vector // GROUP).to(tl.int64)
    head = kv_head * GROUP + vector % GROUP
    position = tl.where(is_vector, length - count + vector // GROUP, -1)
    return vector, token, head, is_vector, position
