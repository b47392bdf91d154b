// linear for bfloat16 in AMX tiles: y^T = weight x^T. The weights are the operand that tiles load
// straight from row-major memory, so they are never packed or stored twice; x, the small operand,
// is packed once per call (linear_pack).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/amx_products.h"

#if defined(BATON_HAS_TILES)

namespace baton::cpu::BATON_ISA {

static_assert(kLinearTileRows == kAmxRows && kLinearRowBlock % kAmxRows == 0);

// Packs tiles [begin, end) of 16 rows of x.
inline void pack_rows(const LinearParams& p, int64_t begin, int64_t end) {
  const int columns = linear_tile_rows(p);
  const int64_t size = linear_packed_size(p);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t row = tile * columns, rest = p.num_rows - row;
    const BFloat16* x = static_cast<const BFloat16*>(p.x) + row * p.x_row_stride;
    const auto vector = [&](int i) { return x + i * p.x_row_stride; };
    pack_columns(vector, static_cast<int>(rest < columns ? rest : columns), p.in_features, columns,
                 p.packed_x + tile * size);
  }
}

// Writes a tile of sums, [feature][row], into y.
inline void write_sums(const LinearParams& p, const float (*sums)[kAmxRows], int64_t feature,
                       int64_t num_features, int64_t row, int64_t num_rows) {
  Vec rows[kAmxRows];
  for (int i = 0; i < kAmxRows; ++i) rows[i] = load(sums[i]);
  transpose(rows);
  Vec bias = zero();
  if (p.bias) bias = load_partial(static_cast<const BFloat16*>(p.bias) + feature, num_features);
  BFloat16* y = static_cast<BFloat16*>(p.y) + row * p.out_features + feature;
  for (int64_t i = 0; i < num_rows; ++i, y += p.out_features) {
    const Vec result = p.bias ? rows[i] + bias : rows[i];
    if (num_features == kAmxRows) {
      store(y, result);
    } else {
      store_partial(y, result, num_features);
    }
  }
}

// Rows [row, row_end) of x, the first of which begins a tile, by features [feature, feature_end).
inline void linear_block(const LinearParams& p, int64_t row, int64_t row_end, int64_t feature,
                         int64_t feature_end) {
  const int columns = linear_tile_rows(p);
  const int64_t size = linear_packed_size(p), steps = tile_steps(p.in_features);
  const TileRows weight{
      static_cast<const BFloat16*>(p.weight) + feature * p.weight_row_stride,
      p.weight_row_stride,
      feature_end - feature,
      p.in_features,
  };
  // Zeroed, because narrow tiles write only part of it.
  alignas(64) float sums[kAmxRows][kAmxRows] = {};
  const auto block = [&]<int kRows, int kColumns>(int64_t i, int64_t j) {
    const int64_t first_row = row + j * columns;
    const TileColumns x{p.packed_x + first_row / columns * size, columns, size};
    for_each_sum<kRows, kColumns>([]<int kI, int kJ>() { tile_zero<kI * 2 + kJ>(); });
    // The first rows of x bring the weights from memory, so they prefetch.
    if (j == 0) {
      multiply<kRows, kColumns, true>(weight, i * kAmxRows, x, steps);
    } else {
      multiply<kRows, kColumns>(weight, i * kAmxRows, x, steps);
    }
    for_each_sum<kRows, kColumns>([&]<int kI, int kJ>() {
      const int64_t f = feature + (i + kI) * kAmxRows, r = first_row + kJ * columns;
      tile_store<kI * 2 + kJ>(sums, kAmxRowBytes);
      write_sums(p, sums, f, feature_end - f < kAmxRows ? feature_end - f : kAmxRows, r,
                 row_end - r < columns ? row_end - r : columns);
    });
  };
  for_each_block((feature_end - feature + kAmxRows - 1) / kAmxRows,
                 (row_end - row + columns - 1) / columns, block);
}

}  // namespace baton::cpu::BATON_ISA

#endif  // BATON_HAS_TILES
