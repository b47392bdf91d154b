// The products of scores.h and values.h for bfloat16 in AMX tiles, both in prefill and in decode:
// no other instruction adds in the order of a tile, and a token must have the same bits in both.
//
// Keys are the operand that tiles load straight from the cache; query vectors are packed into pairs
// once per query tile. So tiles of scores come out transposed. The product with values sums over
// rows, so values are interleaved into pairs of rows; probabilities are loaded from the scores.
// Rows behind the last key are not read: they are padding or belong to another row.
//
// Up to 16 query vectors use tiles of that size. With more, the last tile is whole: the content of
// scratch after the last vector is multiplied too. Rows of a product are independent, and those
// results are not used.
#pragma once

#include "cpu/ragged_attention/tile_bf16.h"
#include "cpu/simd/amx_products.h"

namespace baton::cpu::BATON_ISA {

// The products that ragged_attention consists of, and a Scope that lives while a thread uses them.
template <typename T>
struct AttentionProducts : BlockProducts<T> {
  struct Scope {};
};

#if defined(BATON_HAS_TILES)

template <>
struct AttentionProducts<BFloat16> : BlockProducts<BFloat16> {
  typedef Rows<BFloat16> BlockRows;

  // Tiles can only be loaded from rows one distance apart.
  static constexpr bool kHasScatteredRows = false;

  // If tiles stayed configured, every thread switch would save them.
  struct Scope {
    ~Scope() { tile_release(); }
  };

  static void load_queries(const BFloat16* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    configure(count, scratch);
    const int64_t size = packed_size(tile_steps(dim));
    for (int m = 0; m < count; m += kAmxRows) {
      const auto vector = [&](int i) { return query[m + i]; };
      const int here = count - m < kAmxRows ? count - m : kAmxRows;
      const int columns = count < kAmxRows ? count : kAmxRows;
      pack_columns(vector, here, dim, columns, scratch.query.data + m / kAmxRows * size);
    }
  }

  static void score(int count, const BlockRows& keys, AttentionScratch& scratch) {
    if (count <= kAmxRows) return score_few(count, keys, scratch);
    const int64_t steps = tile_steps(keys.dim), size = packed_size(steps);
    const int64_t num_keys = keys.count - keys.first;
    const TileRows rows{keys.data + keys.first * keys.stride, keys.stride, num_keys, keys.dim};
    const auto block = [&]<int kRows, int kColumns>(int64_t i, int64_t j) {
      const TileColumns queries{scratch.query.data + j * size, kAmxRows, size};
      for_each_sum<kRows, kColumns>([]<int kI, int kJ>() { tile_zero<kI * 2 + kJ>(); });
      multiply<kRows, kColumns>(rows, i * kAmxRows, queries, steps);
      for_each_sum<kRows, kColumns>([&]<int kI, int kJ>() {
        const int64_t k = keys.first + (i + kI) * kAmxRows;
        // The first query vectors prefetch what comes next, a share with every tile of scores.
        constexpr int kShare = kAmxRows / kColumns;
        if (j == 0) keys.used<kShare>(k + kJ * kShare);
        alignas(64) float sums[kAmxRows][kAmxRows];
        tile_store<kI * 2 + kJ>(sums, kAmxRowBytes);
        Vec scores[kAmxRows];
        for (int n = 0; n < kAmxRows; ++n) scores[n] = load(sums[n]);
        transpose(scores);
        for (int m = 0; m < kAmxRows; ++m) {
          store(&scratch.scores[(j + kJ) * kAmxRows + m][k], scores[m]);
        }
      });
    };
    for_each_block(num_tiles(num_keys), num_tiles(count), block);
  }

  static bool uses_block_in_place(int) { return false; }

  template <typename Softmax>
  static void weigh(int count, const BlockRows& values, Softmax&, AttentionScratch& scratch) {
    float* pairs = scratch.values.data;
    const int64_t steps = tile_steps(values.count), size = packed_size(steps);
    pack_values(values, pairs);
    if (count <= kAmxRows) return weigh_few(count, values, pairs, scratch);
    const TileRows probabilities{reinterpret_cast<const BFloat16*>(scratch.scores), 2 * kBlockKeys,
                                 kMaxQueries, values.count};
    const auto block = [&]<int kRows, int kColumns>(int64_t i, int64_t j) {
      const TileColumns columns{pairs + j * size, kAmxRows, size};
      const auto total = [&](int64_t row, int64_t column) {
        return &scratch.out[row * kAmxRows][column * kAmxRows];
      };
      const int64_t stride = scratch.out.stride * sizeof(float);
      for_each_sum<kRows, kColumns>(
          [&]<int kI, int kJ>() { tile_load<kI * 2 + kJ>(total(i + kI, j + kJ), stride); });
      multiply<kRows, kColumns>(probabilities, i * kAmxRows, columns, steps);
      for_each_sum<kRows, kColumns>(
          [&]<int kI, int kJ>() { tile_store<kI * 2 + kJ>(total(i + kI, j + kJ), stride); });
    };
    for_each_block(num_tiles(count), 2 * tile_steps(values.dim), block);
  }

 private:
  static int64_t num_tiles(int64_t rows) { return (rows + kAmxRows - 1) / kAmxRows; }

  // Floats in one packed tile of columns: a step is 16 pairs for each of 16 columns.
  static int64_t packed_size(int64_t steps) { return steps * kAmxRows * kAmxRows; }

  // With up to 16 query vectors, tiles are as wide (scores) or as high (sums) as there are vectors:
  // tiles 0 and 1 hold scores, 2 and 3 sums, 4 and 5 keys or values, 6 query vectors, 7
  // probabilities. With more vectors the layout is that of TileScope.
  static void configure(int count, AttentionScratch& scratch) {
    const int vectors = count < kAmxRows ? count : kAmxRows;
    if (scratch.tile_vectors == vectors) return;
    scratch.tile_vectors = vectors;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      const bool is_wide = tile == 0 || tile == 1 || tile == 6;
      const bool is_high = tile == 2 || tile == 3 || tile == 7;
      config.rows[tile] = static_cast<uint8_t>(is_high ? vectors : kAmxRows);
      config.row_bytes[tile] = static_cast<uint16_t>(is_wide ? 4 * vectors : kAmxRowBytes);
    }
    tile_configure(config);
  }

  // Loads rows [row, row + 16) for one step.
  template <int kTile>
  static BATON_INLINE void load_rows(const TileRows& a, int64_t row, int64_t column) {
    if (row + kAmxRows <= a.num_rows && column + kAmxStep <= a.num_columns) {
      tile_load<kTile>(a.data + row * a.stride + column, 2 * a.stride);
    } else {
      load_some_rows<kTile>(a, row, column);
    }
  }

  static void score_few(int count, const BlockRows& keys, AttentionScratch& scratch) {
    const int64_t steps = tile_steps(keys.dim), step_size = kAmxRows * count;
    const TileRows rows{keys.data, keys.stride, keys.count, keys.dim};
    for (int64_t k = keys.first; k < keys.count; k += 2 * kAmxRows) {
      const bool two = k + kAmxRows < keys.count;
      tile_zero<0>();
      if (two) tile_zero<1>();
      for (int64_t step = 0; step < steps; ++step) {
        tile_load<6>(scratch.query.data + step * step_size, 4 * count);
        load_rows<4>(rows, k, step * kAmxStep);
        tile_multiply<0, 4, 6>();
        if (!two) continue;
        load_rows<5>(rows, k + kAmxRows, step * kAmxStep);
        tile_multiply<1, 5, 6>();
      }
      store_scores<0>(count, keys, k, scratch);
      if (two) store_scores<1>(count, keys, k + kAmxRows, scratch);
    }
  }

  // Stores the scores of 16 keys, one key per row of the tile.
  template <int kTile>
  static void store_scores(int count, const BlockRows& keys, int64_t k, AttentionScratch& scratch) {
    keys.used<kAmxRows>(k);
    if (count == 1) return tile_store<kTile>(&scratch.scores[0][k], sizeof(float));
    alignas(64) float sums[kAmxRows * kAmxRows];
    if (count <= 4) {
      tile_store<kTile>(sums, 4 * sizeof(float));
      // Vector i has keys 4 i to 4 i + 3: the parts change places, then the lanes within them.
      const __m512 a = (__m512)load(sums), b = (__m512)load(sums + 16), c = (__m512)load(sums + 32),
                   d = (__m512)load(sums + 48);
      const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88),
                   ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
      const __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88),
                   cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
      Vec scores[4] = {(Vec)_mm512_shuffle_f32x4(ab_even, cd_even, 0x88),
                       (Vec)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88),
                       (Vec)_mm512_shuffle_f32x4(ab_even, cd_even, 0xdd),
                       (Vec)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd)};
      transpose_parts(scores[0], scores[1], scores[2], scores[3]);
      for (int m = 0; m < count; ++m) store(&scratch.scores[m][k], scores[m]);
      return;
    }
    tile_store<kTile>(sums, kAmxRowBytes);
    Vec scores[kAmxRows];
    for (int n = 0; n < kAmxRows; ++n) scores[n] = load(sums + n * kAmxRows);
    transpose(scores);
    for (int m = 0; m < count; ++m) store(&scratch.scores[m][k], scores[m]);
  }

  static void weigh_few(int count, const BlockRows& values, const float* pairs,
                        AttentionScratch& scratch) {
    const int64_t steps = tile_steps(values.count), size = packed_size(steps);
    const int64_t stride = scratch.out.stride * sizeof(float);
    const TileRows probabilities{reinterpret_cast<const BFloat16*>(scratch.scores), 2 * kBlockKeys,
                                 count, values.count};
    const bool is_whole = values.count == kBlockKeys;
    for (int64_t d = 0; d < values.dim; d += 2 * kAmxRows, pairs += 2 * size) {
      float* out = scratch.out.data + d;
      tile_load<2>(out, stride);
      tile_load<3>(out + kAmxRows, stride);
      for (int64_t step = 0; step < steps; ++step) {
        if (is_whole) {
          tile_load<7>(probabilities.data + step * kAmxStep, 2 * probabilities.stride);
        } else {
          load_some_rows<7>(probabilities, 0, step * kAmxStep);
        }
        tile_load<4>(pairs + step * kAmxRows * kAmxRows, kAmxRowBytes);
        tile_multiply<2, 7, 4>();
        tile_load<5>(pairs + size + step * kAmxRows * kAmxRows, kAmxRowBytes);
        tile_multiply<3, 7, 5>();
      }
      tile_store<2>(out, stride);
      tile_store<3>(out + kAmxRows, stride);
    }
  }

  // Packs 16 columns of values per tile, in the order of head_dim that put_result() undoes:
  // out[tile][step][pair of rows][column]. Rows behind the last one count as 0.
  static void pack_values(const BlockRows& values, float* out) {
    const int64_t steps = tile_steps(values.count), size = packed_size(steps);
    for (int64_t pair = 0; pair < steps * kAmxRows; ++pair, out += kAmxRows) {
      const int64_t k = 2 * pair;
      const BFloat16* row = values.data + k * values.stride;
      values.used<2>(k);
      for (int64_t d = 0; d < values.dim; d += kPairStep) {
        const bool is_row = k >= values.first && k < values.count;
        const Vec even = is_row ? load_step(row, d, values.dim) : zero();
        const Vec odd =
            is_row && k + 1 < values.count ? load_step(row + values.stride, d, values.dim) : zero();
        const ValuePairs both = interleave((Pairs)even, (Pairs)odd);
        store(out + d / kAmxRows * size, (Vec)both.low);
        store(out + (d / kAmxRows + 1) * size, (Vec)both.high);
      }
    }
  }
};

#endif  // BATON_HAS_TILES

}  // namespace baton::cpu::BATON_ISA
