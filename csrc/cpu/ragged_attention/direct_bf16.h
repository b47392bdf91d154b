// The products of tile.h with few query vectors (decode), where the CPU multiplies pairs
// of bfloat16: keys and values are used straight from the cache, each line of them once.
#pragma once

#include "cpu/ragged_attention/tile.h"
#include "cpu/simd/bf16_pairs.h"

#if defined(__AVX512BF16__)

namespace baton::cpu::BATON_ISA {

struct DirectProducts {
  static_assert(kDirectTile == 4);
  typedef Rows<BFloat16> BlockRows;

  static void load_queries(const BFloat16* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    if (count == 1) return;
    for (int m = 0; m < count; m += kDirectTile) {
      interleave_queries(query + m, count - m, dim, queries(scratch, m));
    }
  }

  static void score(const BFloat16* const* query, int count, const BlockRows& keys,
                    AttentionScratch& scratch) {
    if (count == 1) return score_direct_block(query, count, keys, scratch.scores);
    for (int m = 0; m < count; m += kDirectTile) {
      score_interleaved(queries(scratch, m), keys, scratch.scores + m);
    }
  }

  template <typename Softmax>
  static void weigh(int count, const BlockRows& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    const auto whole = [&]<int kDim>() {
      // As many query vectors as their sums find registers stream the block once.
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
  static constexpr int kChunk = 16;  // elements of one of two queries in a vector

  static BFloat16* queries(AttentionScratch& scratch, int m) {
    return reinterpret_cast<BFloat16*>(scratch.query[m]);
  }

  // [chunk of 16 elements][query of 4][element]; what is missing is 0.
  static void interleave_queries(const BFloat16* const* query, int count, int64_t dim,
                                 BFloat16* out) {
    for (int64_t d = 0; d < dim; d += kPairStep, out += kDirectTile * kPairStep) {
      __m512i x[kDirectTile];
      BATON_UNROLL
      for (int m = 0; m < kDirectTile; ++m) {
        x[m] = m >= count             ? Pairs{}
               : dim - d >= kPairStep ? load_pairs(query[m] + d)
                                      : load_pairs(query[m] + d, dim - d);
      }
      _mm512_storeu_si512(out, _mm512_shuffle_i64x2(x[0], x[1], 0x44));
      _mm512_storeu_si512(out + kPairStep, _mm512_shuffle_i64x2(x[2], x[3], 0x44));
      _mm512_storeu_si512(out + 2 * kPairStep, _mm512_shuffle_i64x2(x[0], x[1], 0xee));
      _mm512_storeu_si512(out + 3 * kPairStep, _mm512_shuffle_i64x2(x[2], x[3], 0xee));
    }
  }

  // Scores of four query vectors: one vector of products serves two of them, each chunk of a key
  // being repeated as it is loaded. That leaves eight partial sums per score to be folded, where
  // lanes along head_dim would leave sixteen, and keys are read in the order of their addresses.
  static void score_interleaved(const BFloat16* query, const BlockRows& keys,
                                float (*scores)[kBlockKeys]) {
    if (keys.dim == 64) return score_rows<64>(query, keys, scores);
    if (keys.dim == 128) return score_rows<128>(query, keys, scores);
    score_rows<0>(query, keys, scores);
  }

  template <int kDim>
  static void score_rows(const BFloat16* query, const BlockRows& keys,
                         float (*scores)[kBlockKeys]) {
    constexpr int kHeld = kDim == 0 ? 1 : kDim / kChunk;
    Pairs q[kHeld][2];
    if constexpr (kDim != 0) {
      BATON_UNROLL
      for (int i = 0; i < kHeld; ++i) {
        q[i][0] = load_pairs(query + 4 * i * kChunk);
        q[i][1] = load_pairs(query + (4 * i + 2) * kChunk);
      }
    }
    // Of one key, queries 0 and 1 in the halves of low, 2 and 3 in those of high.
    const auto multiply = [&](int64_t k, Vec& low, Vec& high) BATON_INLINE_LAMBDA {
      keys.template used<1, kDim>(k);
      const BFloat16* key = keys.data + k * keys.stride;
      low = high = zero();
      if constexpr (kDim != 0) {
        BATON_UNROLL
        for (int i = 0; i < kHeld; ++i) {
          const Pairs chunk = _mm512_broadcast_i64x4(
              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(key + i * kChunk)));
          low = dot_pairs(low, q[i][0], chunk);
          high = dot_pairs(high, q[i][1], chunk);
        }
      } else {
        for (int64_t d = 0; d < keys.dim; d += kChunk) {
          const int64_t here = keys.dim - d < kChunk ? keys.dim - d : kChunk;
          const Pairs chunk = _mm512_broadcast_i64x4(
              _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << here) - 1), key + d));
          low = dot_pairs(low, load_pairs(query + 4 * d), chunk);
          high = dot_pairs(high, load_pairs(query + 4 * d + 2 * kChunk), chunk);
        }
      }
    };
    for (int64_t k = 0; k < keys.count; k += kLanes) {
      Vec low[4], high[4];
      BATON_UNROLL
      for (int i = 0; i < 4; ++i) {
        Vec x[4] = {}, y[4] = {};
        const int64_t first = k + 4 * i;
        if (first + 4 <= keys.count) {
          BATON_UNROLL
          for (int j = 0; j < 4; ++j) multiply(first + j, x[j], y[j]);
        } else {
          for (int j = 0; first + j < keys.count; ++j) multiply(first + j, x[j], y[j]);
        }
        low[i] = fold_keys(x);
        high[i] = fold_keys(y);
      }
      fold_halves(low, scores[0] + k, scores[1] + k);
      fold_halves(high, scores[2] + k, scores[3] + k);
    }
  }

  // Lane 4 i + j of the result: the sum of lanes 4 i to 4 i + 3 of x[j].
  static BATON_INLINE Vec fold_keys(const Vec (&x)[4]) {
    const auto fold = [](Vec a, Vec b) BATON_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                           _mm512_unpackhi_ps((__m512)a, (__m512)b));
    };
    const __m512 ab = fold(x[0], x[1]), cd = fold(x[2], x[3]);
    return (Vec)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }

  // Of four keys each: the quarters of either half are added; the first halves are one query's
  // sixteen scores, the second ones another's.
  static BATON_INLINE void fold_halves(const Vec (&x)[4], float* first, float* second) {
    const auto fold = [](Vec a, Vec b) BATON_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x88),
                           _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xdd));
    };
    const __m512 a = fold(x[0], x[1]), b = fold(x[2], x[3]);
    _mm512_storeu_ps(first, _mm512_shuffle_f32x4(a, b, 0x88));
    _mm512_storeu_ps(second, _mm512_shuffle_f32x4(a, b, 0xdd));
  }

  template <int kDim, int kQueries, typename Softmax>
  static void weigh_stream(const BlockRows& values, Softmax& softmax, AttentionScratch& scratch) {
    constexpr int kSteps = kDim / kPairStep;
    Vec sums[kQueries][2 * kSteps] = {};
    const auto add = [&](int64_t k, bool alone) BATON_INLINE_LAMBDA {
      const BFloat16* even = values.data + k * values.stride;
      Pairs weight[kQueries];
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) weight[m] = broadcast_pair(&scratch.scores[m][k / 2]);
      BATON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        const ValuePairs v =
            interleave(load_pairs(even + i * kPairStep),
                       alone ? Pairs{} : load_pairs(even + values.stride + i * kPairStep));
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          sums[m][2 * i] = dot_pairs(sums[m][2 * i], weight[m], v.low);
          sums[m][2 * i + 1] = dot_pairs(sums[m][2 * i + 1], weight[m], v.high);
        }
      }
    };
    int64_t k = 0;
    for (; k + 2 <= values.count; k += 2) {
      softmax.until(k + 2);
      values.template used<2, kDim>(k);
      add(k, false);
    }
    // The row behind an odd count is not read: it is padding or another row's.
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

  // Eight rows at a time: their weights stay in registers while head_dim is walked, each line of a
  // row is loaded once, and the sums of all query vectors live in the core's cache. Passes over a
  // whole block for a few query vectors at a time would load every line again, at a pace that
  // memory cannot follow in the first pass and does not use in the others.
  static constexpr int kGroupPairs = 4, kGroupRows = 2 * kGroupPairs;

  template <int kDim, typename Softmax>
  static void weigh_groups(int count, const BlockRows& values, Softmax& softmax,
                           AttentionScratch& scratch) {
    int64_t k = 0;
    if (values.count >= kGroupRows) touch_group<kDim>(values, 0);
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

  // A group uses its lines down the rows, an order that the hardware does not foresee: they are
  // brought into the first-level cache a group before, in the order of addresses. Where head_dim
  // is not known that is left out.
  template <int kDim>
  static BATON_INLINE void touch_group(const BlockRows& values, int64_t k) {
    BATON_UNROLL
    for (int i = 0; i < kGroupRows; ++i) {
      BATON_UNROLL
      for (int d = 0; d < kDim; d += kPairStep) {
        __builtin_prefetch(values.data + (k + i) * values.stride + d, 0, 3);
      }
    }
  }

  // Rows k to k + 2 kPairs; of a single pair the second row may be missing.
  template <int kPairs, int kDim>
  static BATON_INLINE void weigh_group(int count, const BlockRows& values, int64_t k,
                                       AttentionScratch& scratch) {
    for_query_tiles<kDirectTile>(count, [&]<int kQueries>(int m) {
      const auto rows = [&]<bool kAsk>() {
        weigh_rows<kPairs, kQueries, kDim, kAsk>(scratch.scores + m, k, values, scratch.out + m);
      };
      m == 0 ? rows.template operator()<true>() : rows.template operator()<false>();
    });
  }

  // kAsk: whether the rows ask for others, spread over the steps through head_dim.
  template <int kPairs, int kQueries, int kDim, bool kAsk>
  static BATON_INLINE void weigh_rows(const float (*p)[kBlockKeys], int64_t k,
                                      const BlockRows& values, float (*out)[kMaxHeadDim]) {
    constexpr int kSteps = kDim == 0 ? 1 : kDim / kPairStep;
    constexpr int kAskRows = 2 * kPairs / kSteps > 0 ? 2 * kPairs / kSteps : 1;
    const BFloat16* rows = values.data + k * values.stride;
    const int64_t stride = values.stride, dim = kDim != 0 ? kDim : values.dim;
    // The row behind an odd count is not read: it is padding or another row's.
    const bool alone = k + 1 == values.count;
    Pairs weight[kQueries][kPairs];
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int j = 0; j < kPairs; ++j) weight[m][j] = broadcast_pair(&p[m][k / 2 + j]);
    }
    const auto step = [&](int64_t d, const auto& load_row) BATON_INLINE_LAMBDA {
      Vec low[kQueries] = {}, high[kQueries] = {};
      BATON_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        const BFloat16* even = rows + 2 * j * stride + d;
        const ValuePairs v =
            interleave(load_row(even), kPairs == 1 && alone ? Pairs{} : load_row(even + stride));
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          low[m] = dot_pairs(low[m], weight[m][j], v.low);
          high[m] = dot_pairs(high[m], weight[m][j], v.high);
        }
      }
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        store(&out[m][d], load(&out[m][d]) + low[m]);
        store(&out[m][d + kLanes], load(&out[m][d + kLanes]) + high[m]);
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
