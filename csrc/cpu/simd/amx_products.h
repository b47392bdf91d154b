// Products of bfloat16 matrices in AMX tiles, used by linear and ragged_attention: 16 to 32 rows,
// straight from row-major memory, by 16 to 32 columns that were packed into pairs.
//
// Every element of a product is summed over steps of 32 in ascending order, whichever rows and
// columns are next to it, so the bits of a row do not depend on its batch.
#pragma once

#include "cpu/simd/amx.h"

#if defined(BATON_HAS_TILES)

#include "cpu/simd/dot.h"
#include "cpu/simd/transpose.h"

namespace baton::cpu::BATON_ISA {

static inline int64_t tile_steps(int64_t length) { return (length + kAmxStep - 1) / kAmxStep; }

// The 32 elements of a row from `column` on. Those from `length` on are 0 and not read.
BATON_INLINE Vec load_step(const BFloat16* row, int64_t column, int64_t length) {
  typedef Dot<BFloat16> D;
  const int64_t rest = length - column;
  return (Vec)(rest >= kAmxStep ? D::operand(row + column)
                                : D::operand_partial(row + column, rest));
}

// The first operand: a matrix in memory. Rows from num_rows on and columns from num_columns on
// belong to other data or to none: they are not read and count as 0.
struct TileRows {
  const BFloat16* data;
  int64_t stride;  // elements from one row to the next
  int64_t num_rows, num_columns;
};

// Loads rows [row, row + 16), elements [column, column + 32), some of which the matrix lacks.
template <int kTile>
__attribute__((noinline)) void load_some_rows(const TileRows& a, int64_t row, int64_t column) {
  alignas(64) float copy[kAmxRows][kAmxRows];
  for (int64_t i = 0; i < kAmxRows; ++i) {
    const BFloat16* from = a.data + (row + i) * a.stride;
    store(copy[i], row + i < a.num_rows ? load_step(from, column, a.num_columns) : zero());
  }
  tile_load<kTile>(copy, kAmxRowBytes);
}

// Packs the second operand from `count` vectors of `length` elements: out[step][pair][column],
// where a pair is elements 2 pair and 2 pair + 1 of the step. Columns from count on are 0.
template <typename Source>
BATON_INLINE void pack_columns(const Source& vector, int count, int64_t length, int num_columns,
                               float* out) {
  for (int64_t k = 0; k < length; k += kAmxStep) {
    Vec rows[kAmxRows];
    for (int i = 0; i < kAmxRows; ++i) {
      rows[i] = i < count ? load_step(vector(i), k, length) : zero();
    }
    transpose(rows);
    const __mmask16 columns = static_cast<__mmask16>((1u << num_columns) - 1);
    for (int i = 0; i < kAmxRows; ++i, out += num_columns) {
      _mm512_mask_storeu_ps(out, columns, (__m512)rows[i]);
    }
  }
}

// The packed second operand.
struct TileColumns {
  const float* data;
  int num_columns;   // per tile
  int64_t distance;  // from one tile of columns to the next
};

// Sums i * 2 + j += rows [row + 16 i ..) x tile j of columns, for kRows x kColumns tiles. With
// kAhead the rows come from memory and are prefetched this many steps before their use, because
// they are more streams than the hardware prefetcher follows.
template <int kRows, int kColumns, bool kAhead = false>
BATON_INLINE void multiply(const TileRows& a, int64_t row, const TileColumns& b, int64_t steps) {
  constexpr int64_t kAheadSteps = 8;
  const int64_t column_bytes = 4 * b.num_columns, row_bytes = 2 * a.stride, distance = b.distance;
  const float* columns = b.data;
  const auto products = [&]() BATON_INLINE_LAMBDA {
    tile_load<6>(columns, column_bytes);
    if constexpr (kColumns == 2) tile_load<7>(columns + distance, column_bytes);
    columns += kAmxRows * column_bytes / 4;
    tile_multiply<0, 4, 6>();
    if constexpr (kColumns == 2) tile_multiply<1, 4, 7>();
    if constexpr (kRows == 2) tile_multiply<2, 5, 6>();
    if constexpr (kRows == 2 && kColumns == 2) tile_multiply<3, 5, 7>();
  };
  const bool is_whole = row + kRows * kAmxRows <= a.num_rows;
  const int64_t whole_steps = is_whole ? a.num_columns / kAmxStep : 0;
  const char* first = reinterpret_cast<const char*>(a.data + row * a.stride);
  int64_t step = 0;
  for (; step < whole_steps && step < steps; ++step, first += kAmxRowBytes) {
    if constexpr (kAhead) {
      const char* ahead = first + kAheadSteps * kAmxRowBytes;
      for (int i = 0; i < kRows * kAmxRows; ++i) __builtin_prefetch(ahead + i * row_bytes, 0, 2);
    }
    tile_load<4>(first, row_bytes);
    if constexpr (kRows == 2) tile_load<5>(first + kAmxRows * row_bytes, row_bytes);
    products();
  }
  for (; step < steps; ++step) {
    load_some_rows<4>(a, row, step * kAmxStep);
    if constexpr (kRows == 2) load_some_rows<5>(a, row + kAmxRows, step * kAmxStep);
    products();
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
// The inner loop goes over columns, which were packed and lie in the core's private cache.
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
