// Products of bfloat16 matrices in AMX tiles: 16 to 32 rows, straight from row-major memory, with
// 16 to 32 columns that were packed to pairs. linear and ragged_attention are made of them.
//
// Every element of a product is summed over steps of 32 in ascending order, whatever the rows and
// columns beside it: that makes the bits of a row independent of its batch.
#pragma once

#include "cpu/amx.h"

#if defined(BATON_HAS_TILES)

#include "cpu/dot.h"

namespace baton::cpu::BATON_ISA {

static inline int64_t tile_steps(int64_t length) {
  return (length + kTilePairStep - 1) / kTilePairStep;
}

// The 32 elements of a row that begin at `column`, 0 from `length` on; those are not read.
BATON_INLINE Vec load_step(const BFloat16* row, int64_t column, int64_t length) {
  typedef Dot<BFloat16> D;
  const int64_t rest = length - column;
  return (Vec)(rest >= kTilePairStep ? D::operand(row + column)
                                     : D::operand_partial(row + column, rest));
}

// First operand: a matrix in memory. Rows from num_rows on and columns from num_columns on are
// somebody else's or nobody's: they are not read, and count as 0.
struct TileRows {
  const BFloat16* data;
  int64_t stride;  // elements from one row to the next
  int64_t num_rows, num_columns;
};

// Rows [row, row + 16), elements [column, column + 32).
template <int kTile>
BATON_INLINE void load_rows(const TileRows& a, int64_t row, int64_t column) {
  const BFloat16* first = a.data + row * a.stride;
  if (row + kTileRows <= a.num_rows && column + kTilePairStep <= a.num_columns) {
    tile_load<kTile>(first + column, a.stride * 2);
    return;
  }
  alignas(64) float copy[kTileRows][kTileRows];
  for (int i = 0; i < kTileRows; ++i) {
    store(copy[i],
          row + i < a.num_rows ? load_step(first + i * a.stride, column, a.num_columns) : zero());
  }
  tile_load<kTile>(copy, kTileBytes);
}

// Second operand, from `count` vectors of `length` elements: out[step][pair][column], a pair being
// elements 2 pair and 2 pair + 1 of the step. Columns from count on are 0.
template <typename Source>
BATON_INLINE void pack_columns(const Source& vector, int count, int64_t length, int num_columns,
                               float* out) {
  for (int64_t k = 0; k < length; k += kTilePairStep) {
    Vec rows[kTileRows];
    for (int i = 0; i < kTileRows; ++i) {
      rows[i] = i < count ? load_step(vector(i), k, length) : zero();
    }
    transpose(rows);
    const __mmask16 columns = static_cast<__mmask16>((1u << num_columns) - 1);
    for (int i = 0; i < kTileRows; ++i, out += num_columns) {
      _mm512_mask_storeu_ps(out, columns, (__m512)rows[i]);
    }
  }
}

// The second operand as it was packed.
struct TileColumns {
  const float* data;
  int num_columns;   // of a tile
  int64_t distance;  // from one tile of columns to the next
};

// Sums i * 2 + j += rows [row + 16 i ..) x tile j of columns, for kRows x kColumns tiles.
template <int kRows, int kColumns>
BATON_INLINE void multiply(const TileRows& a, int64_t row, const TileColumns& b, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    const float* columns = b.data + step * kTileRows * b.num_columns;
    load_rows<4>(a, row, step * kTilePairStep);
    if constexpr (kRows == 2) load_rows<5>(a, row + kTileRows, step * kTilePairStep);
    tile_load<6>(columns, 4 * b.num_columns);
    if constexpr (kColumns == 2) tile_load<7>(columns + b.distance, 4 * b.num_columns);
    tile_multiply<0, 4, 6>();
    if constexpr (kColumns == 2) tile_multiply<1, 4, 7>();
    if constexpr (kRows == 2) tile_multiply<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) tile_multiply<3, 5, 7>();
  }
}

// Calls fn.operator()<i, j>() for every tile of sums.
template <int kRows, int kColumns, typename Fn>
BATON_INLINE void for_each_sum(Fn&& fn) {
  fn.template operator()<0, 0>();
  if constexpr (kColumns == 2) fn.template operator()<0, 1>();
  if constexpr (kRows == 2) fn.template operator()<1, 0>();
  if constexpr (kRows == 2 && kColumns == 2) fn.template operator()<1, 1>();
}

// Calls fn.operator()<kRows, kColumns>(row tile, column tile) for blocks of at most 2 x 2 tiles.
// The columns are the inner loop: they were packed, and lie in the core's own cache.
template <typename Fn>
BATON_INLINE void for_each_block(int64_t row_tiles, int64_t column_tiles, Fn&& fn) {
  for (int64_t i = 0; i < row_tiles; i += 2) {
    for (int64_t j = 0; j < column_tiles; j += 2) {
      const bool two_rows = i + 1 < row_tiles, two_columns = j + 1 < column_tiles;
      if (two_rows && two_columns) {
        fn.template operator()<2, 2>(i, j);
      } else if (two_rows) {
        fn.template operator()<2, 1>(i, j);
      } else if (two_columns) {
        fn.template operator()<1, 2>(i, j);
      } else {
        fn.template operator()<1, 1>(i, j);
      }
    }
  }
}

}  // namespace baton::cpu::BATON_ISA

#endif  // BATON_HAS_TILES
