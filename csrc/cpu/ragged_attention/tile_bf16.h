// The product with values on CPUs that multiply pairs of bfloat16 into float32 sums.
//
// Probabilities are rounded to bfloat16 for the product with values, as tensor-core attention does;
// their sum is taken before rounding. Two rows of values are interleaved into pairs of keys with
// one unpack per half. This leaves the sums in a permuted order of head_dim (within every 32
// elements: 0-3, 8-11, 16-19, 24-27, then 4-7, 12-15, ...), which put_result() undoes.
#pragma once

#include "cpu/ragged_attention/direct_bf16.h"

#if defined(__AVX512BF16__)

namespace baton::cpu::BATON_ISA {

// out[m][d ..] += p value over kSteps * 32 elements of head_dim; source(k, i) gives a row pair,
// before(k) is called first.
template <int kQueries, int kSteps, typename Source, typename Before>
BATON_INLINE void weigh_pairs(const float (*p)[kBlockKeys], Columns pairs, const Source& source,
                              Before& before, Matrix out, int64_t d) {
  Vec sums[kQueries][2 * kSteps] = {};
  for (int64_t k = pairs.begin; k < pairs.end; ++k) {
    before(k);
    ValuePairs v[kSteps];
    BATON_UNROLL
    for (int i = 0; i < kSteps; ++i) v[i] = source(k, d + i * kPairStep);
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const Pairs weight = broadcast_pair(&p[m][k]);
      BATON_UNROLL
      for (int i = 0; i < kSteps; ++i) {
        sums[m][2 * i] = dot_pairs(sums[m][2 * i], weight, v[i].low);
        sums[m][2 * i + 1] = dot_pairs(sums[m][2 * i + 1], weight, v[i].high);
      }
    }
  }
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    BATON_UNROLL
    for (int i = 0; i < 2 * kSteps; ++i) {
      float* total = &out[m][d + i * kLanes];
      store(total, load(total) + sums[m][i]);
    }
  }
}

template <>
struct BlockProducts<BFloat16> : BlockScores<BFloat16> {
  typedef Rows<BFloat16> BlockRows;

  static bool uses_block_in_place(int count) { return count <= kDirectQueries; }

  // Stores them as bfloat16 pairs of keys in the first half of the row, whose scores have been
  // used.
  static BATON_INLINE void put_probabilities(float* scores, int i, Vec probabilities) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh((__m512)probabilities);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(scores + i * kLanes / 2), rounded);
  }

  template <typename Softmax>
  static void weigh(int count, const BlockRows& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      DirectProducts::weigh(count, values, softmax, scratch);
    } else {
      weigh_packed(count, values, scratch);
    }
  }

  template <typename Softmax>
  static void weigh(int count, const ScatteredRows<BFloat16>& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    DirectProducts::weigh(count, values, softmax, scratch);
  }

  // Undoes the permutation of the sums.
  static void put_result(const float* sums, int64_t dim, float factor, BFloat16* out) {
    for (int64_t d = 0; d < dim; d += kPairStep) {
      const auto low = (__m256i)to_bfloat16(load(sums + d) * set1(factor));
      const auto high = (__m256i)to_bfloat16(load(sums + d + kLanes) * set1(factor));
      const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      const __m512i fours = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
      const int64_t here = dim - d < kPairStep ? dim - d : kPairStep;
      _mm512_mask_storeu_epi16(out + d, static_cast<__mmask32>((uint64_t{1} << here) - 1),
                               _mm512_permutexvar_epi64(fours, both));
    }
  }

 private:
  // Row pair k of the block from element d on. The row behind an odd count is not read: it is
  // padding or belongs to another row.
  static BATON_INLINE ValuePairs row_pair(const BlockRows& rows, int64_t k, int64_t d) {
    const BFloat16* even = rows.data + 2 * k * rows.stride + d;
    const BFloat16* odd = even + rows.stride;
    const bool alone = 2 * k + 1 == rows.count;
    if (rows.dim - d >= kPairStep) {
      return interleave(load_pairs(even), alone ? Pairs{} : load_pairs(odd));
    }
    return interleave(load_pairs(even, rows.dim - d),
                      alone ? Pairs{} : load_pairs(odd, rows.dim - d));
  }

  template <typename Source>
  static void weigh_tiles(int count, Columns pairs, const BlockRows& values, const Source& source,
                          AttentionScratch& scratch) {
    for_query_tiles<kPackedTile>(count, [&]<int kQueries>(int m) {
      auto before = values.share(m, kQueries, count);
      int64_t d = 0;
      for (; d + 2 * kPairStep <= values.dim; d += 2 * kPairStep) {
        weigh_pairs<kQueries, 2>(scratch.scores + m, pairs, source, before, scratch.out + m, d);
      }
      for (; d < values.dim; d += kPairStep) {
        weigh_pairs<kQueries, 1>(scratch.scores + m, pairs, source, before, scratch.out + m, d);
      }
    });
  }

  static void weigh_packed(int count, const BlockRows& values, AttentionScratch& scratch) {
    const Columns pairs{values.first / 2, (values.count + 1) / 2};
    // [pair of keys][element pairs in the interleaved order]
    const Matrix unpacked = scratch.values;
    for (int64_t k = pairs.begin; k < pairs.end; ++k) {
      for (int64_t d = 0; d < values.dim; d += kPairStep) {
        const ValuePairs pair = row_pair(values, k, d);
        _mm512_storeu_si512(&unpacked[k][d], pair.low);
        _mm512_storeu_si512(&unpacked[k][d + kLanes], pair.high);
      }
    }
    const auto source = [&](int64_t k, int64_t d) BATON_INLINE_LAMBDA {
      return ValuePairs{load_pairs(&unpacked[k][d]), load_pairs(&unpacked[k][d + kLanes])};
    };
    weigh_tiles(count, pairs, values, source, scratch);
  }
};

}  // namespace baton::cpu::BATON_ISA

#endif  // __AVX512BF16__
