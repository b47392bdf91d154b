// The product with values for few query vectors (decode), on CPUs that multiply pairs of bfloat16:
// values are used straight from the cache, and each of their lines is loaded once.
#pragma once

#include "cpu/ragged_attention/values.h"

#if defined(__AVX512BF16__)

namespace baton::cpu::BATON_ISA {

struct DirectProducts {
  static_assert(kDirectTile == 4);
  template <typename BlockRows, typename Softmax>
  static void weigh(int count, const BlockRows& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    const auto whole = [&]<int kDim>() {
      // If registers hold the sums of all query vectors, the block is read once.
      constexpr int kHeld = 256 / kDim;
      if (count > kHeld) return weigh_groups<kDim>(count, values, softmax, scratch);
      const auto stream = [&]<int kQueries>() {
        weigh_stream<kDim, kQueries>(values, softmax, scratch);
      };
      if constexpr (kHeld == 4) {
        dispatch_int<1, 2, 3, 4>(count, stream);
      } else {
        dispatch_int<1, 2>(count, stream);
      }
    };
    if (values.dim == 64) return whole.template operator()<64>();
    if (values.dim == 128) return whole.template operator()<128>();
    weigh_groups<0>(count, values, softmax, scratch);
  }

 private:
  template <int kDim, int kQueries, typename BlockRows, typename Softmax>
  static void weigh_stream(const BlockRows& values, Softmax& softmax, AttentionScratch& scratch) {
    constexpr int kSteps = kDim / kPairStep;
    Vec sums[kQueries][2 * kSteps] = {};
    const auto add = [&](int64_t k, bool alone) BATON_INLINE_LAMBDA {
      const BFloat16* even = values.row(k);
      const BFloat16* odd = alone ? nullptr : values.row(k + 1);
      Pairs weight[kQueries];
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) weight[m] = broadcast_pair(&scratch.scores[m][k / 2]);
      BATON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const ValuePairs v = interleave(load_pairs(even + i * kPairStep),
                                        alone ? Pairs{} : load_pairs(odd + i * kPairStep));
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          sums[m][2 * i] = dot_pairs(sums[m][2 * i], weight[m], v.low);
          sums[m][2 * i + 1] = dot_pairs(sums[m][2 * i + 1], weight[m], v.high);
        }
      }
    };
    int64_t k = values.first;
    for (; k + 2 <= values.count; k += 2) {
      softmax.until(k + 2);
      values.template used<2, kDim>(k);
      add(k, false);
    }
    // The row behind an odd count is not read: it is padding or belongs to another row.
    if (k < values.count) {
      softmax.until(k + 1);
      add(k, true);
    }
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int i = 0; i < 2 * kSteps; ++i) {
        float* total = &scratch.out[m][i * kLanes];
        store(total, load(total) + sums[m][i]);
      }
    }
  }

  // Eight rows at a time: their weights stay in registers during the walk over head_dim, each line
  // of a row is loaded once, and the block's sums of all query vectors stay in the core's cache.
  // Passes over a whole block for a few query vectors each would load every line again: memory
  // could not keep up in the first pass and would be idle in the others.
  static constexpr int kGroupPairs = 4, kGroupRows = 2 * kGroupPairs;

  template <int kDim, typename BlockRows, typename Softmax>
  static void weigh_groups(int count, const BlockRows& values, Softmax& softmax,
                           AttentionScratch& scratch) {
    int64_t k = values.first;
    if (k + kGroupRows <= values.count) touch_group<kDim>(values, k);
    for (; k + kGroupRows <= values.count; k += kGroupRows) {
      softmax.until(k + kGroupRows);
      if (k + 2 * kGroupRows <= values.count) touch_group<kDim>(values, k + kGroupRows);
      weigh_group<kGroupPairs, kDim>(count, values, k, scratch);
    }
    for (; k < values.count; k += 2) {
      softmax.until(k + 1);
      weigh_group<1, kDim>(count, values, k, scratch);
    }
  }

  // A group uses its lines down the rows, in an order that the hardware prefetcher does not
  // foresee. So they are prefetched into the first-level cache one group ahead, in the order of
  // addresses. Where head_dim is not known at compile time, they are not.
  template <int kDim, typename BlockRows>
  static BATON_INLINE void touch_group(const BlockRows& values, int64_t k) {
    BATON_UNROLL
    for (int i = 0; i < kGroupRows; ++i) {
      BATON_UNROLL
      for (int d = 0; d < kDim; d += kPairStep) {
        __builtin_prefetch(values.row(k + i) + d, 0, 3);
      }
    }
  }

  // Rows k to k + 2 kPairs; the second row of a single pair may be missing.
  template <int kPairs, int kDim, typename BlockRows>
  static BATON_INLINE void weigh_group(int count, const BlockRows& values, int64_t k,
                                       AttentionScratch& scratch) {
    for_query_tiles<kDirectTile>(count, [&]<int kQueries>(int m) {
      const auto rows = [&]<bool kAsk>() {
        weigh_rows<kPairs, kQueries, kDim, kAsk>(scratch.scores + m, k, values,
                                                 Sums{scratch.out, scratch.block} + m);
      };
      m == 0 ? rows.template operator()<true>() : rows.template operator()<false>();
    });
  }

  // kAsk: whether these rows prefetch others, spread over the steps through head_dim.
  template <int kPairs, int kQueries, int kDim, bool kAsk, typename BlockRows>
  static BATON_INLINE void weigh_rows(const float (*p)[kBlockKeys], int64_t k,
                                      const BlockRows& values, Sums to) {
    constexpr int kSteps = kDim == 0 ? 1 : kDim / kPairStep;
    constexpr int kAskRows = 2 * kPairs / kSteps > 0 ? 2 * kPairs / kSteps : 1;
    const int64_t dim = kDim != 0 ? kDim : values.dim;
    // The row behind an odd count is not read: it is padding or belongs to another row.
    const bool alone = k + 1 == values.count;
    const bool is_first = k == values.first, is_last = k + 2 * kPairs >= values.count;
    const BFloat16* rows[2 * kPairs];
    BATON_UNROLL
    for (int i = 0; i < 2 * kPairs; ++i) {
      rows[i] = kPairs == 1 && i == 1 && alone ? nullptr : values.row(k + i);
    }
    Pairs weight[kQueries][kPairs];
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int j = 0; j < kPairs; ++j) weight[m][j] = broadcast_pair(&p[m][k / 2 + j]);
    }
    const auto step = [&](int64_t d, const auto& load_row) BATON_INLINE_LAMBDA {
      Vec low[kQueries], high[kQueries];
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        low[m] = is_first ? zero() : load(&to.block[m][d]);
        high[m] = is_first ? zero() : load(&to.block[m][d + kLanes]);
      }
      BATON_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        const ValuePairs v =
            interleave(load_row(rows[2 * j] + d),
                       kPairs == 1 && alone ? Pairs{} : load_row(rows[2 * j + 1] + d));
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          low[m] = dot_pairs(low[m], weight[m][j], v.low);
          high[m] = dot_pairs(high[m], weight[m][j], v.high);
        }
      }
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        if (is_last) {
          store(&to.out[m][d], load(&to.out[m][d]) + low[m]);
          store(&to.out[m][d + kLanes], load(&to.out[m][d + kLanes]) + high[m]);
        } else {
          store(&to.block[m][d], low[m]);
          store(&to.block[m][d + kLanes], high[m]);
        }
      }
    };
    int64_t d = 0;
    for (; d + kPairStep <= dim; d += kPairStep) {
      if constexpr (kAsk) {
        const int64_t row = d / kPairStep * kAskRows;
        if (row < 2 * kPairs) values.template used<kAskRows, kDim>(k + row);
      }
      step(d, [](const BFloat16* row) BATON_INLINE_LAMBDA { return load_pairs(row); });
    }
    if (d < dim) {
      step(d, [&](const BFloat16* row) BATON_INLINE_LAMBDA { return load_pairs(row, dim - d); });
    }
  }
};

}  // namespace baton::cpu::BATON_ISA

#endif  // __AVX512BF16__
