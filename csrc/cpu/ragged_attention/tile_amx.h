// The products of tile.h for bfloat16 in AMX tiles: of prefill, and of decode with a
// group of heads; one to three query vectors are left to tile_bf16.h.
//
// Keys are the operand that tiles load straight from the cache, query vectors are packed to pairs
// once per tile of theirs: tiles of scores come out transposed. Values, of which a product sums
// over the rows, are interleaved to pairs of rows; probabilities are loaded from the scores. Rows
// behind the last key are not read: they are padding or another row's.
//
// Tiles are always whole. Where there are fewer query vectors, rows of scratch beyond them are
// multiplied too, whatever they hold: no row of a product sees another, and nobody uses theirs.
#pragma once

#include "cpu/ragged_attention/tile_bf16.h"
#include "cpu/simd/amx_products.h"

namespace baton::cpu::BATON_ISA {

// The products that ragged_attention is made of, and what a thread holds while it works on items.
template <typename T>
struct AttentionProducts : BlockProducts<T> {
  struct Scope {};
};

#if defined(BATON_HAS_TILES)

template <>
struct AttentionProducts<BFloat16> : BlockProducts<BFloat16> {
  typedef BlockProducts<BFloat16> Few;
  typedef Rows<BFloat16> BlockRows;

  // Tiles multiply 16 query vectors in the time of one, and the pairs of values are interleaved
  // once for all of them: from here on that is less work than a pass over vectors for each.
  static constexpr int kFewest = 4;

  struct Scope {
    TileScope tiles{kAmxRows};
  };

  static void load_queries(const BFloat16* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    if (count < kFewest) return Few::load_queries(query, count, dim, scratch);
    const int64_t size = packed_size(tile_steps(dim));
    for (int m = 0; m < count; m += kAmxRows) {
      const auto vector = [&](int i) { return query[m + i]; };
      const int here = count - m < kAmxRows ? count - m : kAmxRows;
      pack_columns(vector, here, dim, kAmxRows, &scratch.query[0][0] + m / kAmxRows * size);
    }
  }

  static void score(const BFloat16* const* query, int count, const BlockRows& keys,
                    AttentionScratch& scratch) {
    if (count < kFewest) return Few::score(query, count, keys, scratch);
    const int64_t steps = tile_steps(keys.dim), size = packed_size(steps);
    const TileRows rows{keys.data, keys.stride, keys.count, keys.dim};
    const auto block = [&]<int kRows, int kColumns>(int64_t i, int64_t j) {
      const TileColumns queries{&scratch.query[0][0] + j * size, kAmxRows, size};
      for_each_sum<kRows, kColumns>([]<int kI, int kJ>() { tile_zero<kI * 2 + kJ>(); });
      multiply<kRows, kColumns>(rows, i * kAmxRows, queries, steps);
      for_each_sum<kRows, kColumns>([&]<int kI, int kJ>() {
        // The first query vectors ask for what comes next, a share beside every tile of scores.
        constexpr int kShare = kAmxRows / kColumns;
        if (j == 0) keys.used<kShare>(i * kAmxRows + (kI * kColumns + kJ) * kShare);
        alignas(64) float sums[kAmxRows][kAmxRows];
        tile_store<kI * 2 + kJ>(sums, kAmxRowBytes);
        Vec scores[kAmxRows];
        for (int k = 0; k < kAmxRows; ++k) scores[k] = load(sums[k]);
        transpose(scores);
        for (int m = 0; m < kAmxRows; ++m) {
          store(&scratch.scores[(j + kJ) * kAmxRows + m][(i + kI) * kAmxRows], scores[m]);
        }
      });
    };
    for_each_block(num_tiles(keys.count), num_tiles(count), block);
  }

  static bool uses_block_in_place(int count) { return count < kFewest; }

  template <typename Softmax>
  static void weigh(int count, const BlockRows& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    if (count < kFewest) return Few::weigh(count, values, softmax, scratch);
    float* pairs = &scratch.values[0][0];
    const int64_t steps = tile_steps(values.count), size = packed_size(steps);
    pack_values(values, pairs);
    const TileRows probabilities{reinterpret_cast<const BFloat16*>(scratch.scores), 2 * kBlockKeys,
                                 kMaxQueries, values.count};
    const auto block = [&]<int kRows, int kColumns>(int64_t i, int64_t j) {
      const TileColumns columns{pairs + j * size, kAmxRows, size};
      const auto total = [&](int64_t row, int64_t column) {
        return &scratch.out[row * kAmxRows][column * kAmxRows];
      };
      constexpr int64_t kStride = sizeof(scratch.out[0]);
      for_each_sum<kRows, kColumns>(
          [&]<int kI, int kJ>() { tile_load<kI * 2 + kJ>(total(i + kI, j + kJ), kStride); });
      multiply<kRows, kColumns>(probabilities, i * kAmxRows, columns, steps);
      for_each_sum<kRows, kColumns>(
          [&]<int kI, int kJ>() { tile_store<kI * 2 + kJ>(total(i + kI, j + kJ), kStride); });
    };
    for_each_block(num_tiles(count), 2 * tile_steps(values.dim), block);
  }

 private:
  static int64_t num_tiles(int64_t rows) { return (rows + kAmxRows - 1) / kAmxRows; }

  // Floats of one packed tile of columns: a step is 16 pairs of 16 columns.
  static int64_t packed_size(int64_t steps) { return steps * kAmxRows * kAmxRows; }
  static_assert(sizeof(AttentionScratch::query) >= kMaxQueries * kMaxHeadDim * 2);
  static_assert(sizeof(AttentionScratch::values) >= kBlockKeys * kMaxHeadDim * 2);

  // Tiles of 16 columns of values, in the order of head_dim that put_result() undoes:
  // out[tile][step][pair of rows][column]. Rows behind the last one count as 0.
  static void pack_values(const BlockRows& values, float* out) {
    const int64_t steps = tile_steps(values.count), size = packed_size(steps);
    for (int64_t pair = 0; pair < steps * kAmxRows; ++pair, out += kAmxRows) {
      const int64_t k = 2 * pair;
      const BFloat16* row = values.data + k * values.stride;
      values.used<2>(k);
      for (int64_t d = 0; d < values.dim; d += kPairStep) {
        const Vec even = k < values.count ? load_step(row, d, values.dim) : zero();
        const Vec odd =
            k + 1 < values.count ? load_step(row + values.stride, d, values.dim) : zero();
        const ValuePairs both = interleave((Pairs)even, (Pairs)odd);
        store(out + d / kAmxRows * size, (Vec)both.low);
        store(out + (d / kAmxRows + 1) * size, (Vec)both.high);
      }
    }
  }
};

#endif  // BATON_HAS_TILES

}  // namespace baton::cpu::BATON_ISA
