// The register tile of linear where vectors are as long as a cache line: a vector of products
// serves two rows of x, one in each half. That leaves eight partial sums of each dot product, where
// one row per vector would leave sixteen; folding those takes a fourth of the time if in_features
// is small.
#pragma once

#include "common/linear.h"
#include "cpu/simd/simd.h"

#if defined(__AVX512F__)

namespace baton::cpu::BATON_ISA {

// kStep elements of one row; once converted to what step() multiplies, they fill half a vector.
template <typename T>
struct HalfDot {
  static constexpr int kStep = 8;
  typedef __m512 Operand;
  static BATON_INLINE __m128i load(const T* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  }
  static BATON_INLINE __m128i load(const T* p, int64_t n) {
    return _mm_maskz_loadu_epi16(static_cast<__mmask8>((1u << n) - 1), p);
  }
  static BATON_INLINE Operand join(__m128i a, __m128i b) {
    const ShortVec both = (ShortVec)_mm256_set_m128i(b, a);
    if constexpr (__is_same(T, Half)) {
      return (__m512)from_half(both);
    } else {
      return (__m512)from_bfloat16(both);
    }
  }
  static BATON_INLINE Operand repeat(__m128i a) { return join(a, a); }
  static BATON_INLINE Vec step(Operand a, Operand b, Vec sum) { return fmadd((Vec)a, (Vec)b, sum); }
};

template <>
struct HalfDot<float> {
  static constexpr int kStep = 8;
  typedef __m512 Operand;
  static BATON_INLINE __m256 load(const float* p) { return _mm256_loadu_ps(p); }
  static BATON_INLINE __m256 load(const float* p, int64_t n) {
    return _mm256_maskz_loadu_ps(static_cast<__mmask8>((1u << n) - 1), p);
  }
  static BATON_INLINE Operand join(__m256 a, __m256 b) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(a), b, 1);
  }
  static BATON_INLINE Operand repeat(__m256 a) { return _mm512_broadcast_f32x8(a); }
  static BATON_INLINE Vec step(Operand a, Operand b, Vec sum) { return fmadd((Vec)a, (Vec)b, sum); }
};

#if defined(__AVX512BF16__)
template <>
struct HalfDot<BFloat16> {
  static constexpr int kStep = 16;
  typedef __m512i Operand;
  static BATON_INLINE __m256i load(const BFloat16* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static BATON_INLINE __m256i load(const BFloat16* p, int64_t n) {
    return _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p);
  }
  static BATON_INLINE Operand join(__m256i a, __m256i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
  }
  static BATON_INLINE Operand repeat(__m256i a) { return _mm512_broadcast_i64x4(a); }
  static BATON_INLINE Vec step(Operand a, Operand b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// rows(): two rows in the halves of a vector. twice(): the same elements of one row in both halves.
// With n, only the first n elements are read.
template <typename T>
struct PairDot : HalfDot<T> {
  typedef HalfDot<T> Single;
  typedef typename Single::Operand Operand;
  template <typename... N>
  static BATON_INLINE Operand rows(const T* a, const T* b, N... n) {
    return Single::join(Single::load(a, n...), Single::load(b, n...));
  }
  template <typename... N>
  static BATON_INLINE Operand twice(const T* p, N... n) {
    return Single::repeat(Single::load(p, n...));
  }
};

// For eight features: the sums of the first row in the first eight lanes, of the second row behind.
BATON_INLINE Vec fold_pair(const Vec (&x)[8]) {
  const auto fold_four = [](const Vec* x) BATON_INLINE_LAMBDA {
    const auto fold = [](Vec a, Vec b) BATON_INLINE_LAMBDA {
      return _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b),
                           _mm512_unpackhi_ps((__m512)a, (__m512)b));
    };
    const __m512 ab = fold(x[0], x[1]), cd = fold(x[2], x[3]);
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  };
  const __m512 low = fold_four(x), high = fold_four(x + 4);
  const __m512 mixed =
      _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  return (Vec)_mm512_shuffle_f32x4(mixed, mixed, 0xd8);
}

// Of 32 registers, 24 are accumulators, 6 hold x and one holds weights.
constexpr int kTilePairs = 3, kPairFeatures = 8;

// Where a pass over the weights prefetches those of the next features: one line of each every
// `step` elements. The passes divide the lines, so that prefetches are spread over all of them.
struct WeightsAhead {
  int64_t next, step;
};

// y for rows [row, row + 2 kPairs), as far as they exist, and eight features.
template <typename T, int kPairs>
void pair_tile(const LinearParams& p, int64_t row, int64_t row_end, int64_t feature,
               WeightsAhead ahead) {
  typedef PairDot<T> D;
  // Two steps at once, which is a line for elements that need no conversion: where rows lie a power
  // of two apart, the lines of fourteen rows would evict each other from the first-level cache
  // between the two steps.
  constexpr int64_t kLine = 2 * D::kStep;
  const T* x[2 * kPairs];
  BATON_UNROLL
  for (int m = 0; m < 2 * kPairs; ++m) {
    // The last row may have no partner; it is then paired with itself.
    const int64_t r = row + m < row_end ? row + m : row_end - 1;
    x[m] = static_cast<const T*>(p.x) + r * p.x_row_stride;
  }
  const int64_t stride = p.weight_row_stride;
  const T* weight = static_cast<const T*>(p.weight) + feature * stride;
  // Long sums are cut into stretches: a single chain of additions over all of in_features would
  // round too much. The sums of earlier stretches do not fit in registers.
  constexpr int64_t kStretch = 40 * kLine;
  const int64_t whole = p.in_features / kLine * kLine;
  Vec sums[kPairs][kPairFeatures], earlier[kPairs][kPairFeatures];
  for (int64_t k = 0;;) {
    const int64_t begin = k, end = k + kStretch < whole ? k + kStretch : whole;
    BATON_UNROLL
    for (int m = 0; m < kPairs; ++m) {
      BATON_UNROLL
      for (int n = 0; n < kPairFeatures; ++n) sums[m][n] = zero();
    }
    for (; k < end; k += kLine) {
      if (k == ahead.next) {
        // Prefetching past the end of a tensor reads nothing.
        BATON_UNROLL
        for (int n = 0; n < kPairFeatures; ++n) {
          __builtin_prefetch(weight + (n + kPairFeatures) * stride + k, 0, 2);
        }
        ahead.next += ahead.step;
      }
      typename D::Operand v[kPairs][2];
      BATON_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        v[m][0] = D::rows(x[2 * m] + k, x[2 * m + 1] + k);
        v[m][1] = D::rows(x[2 * m] + k + D::kStep, x[2 * m + 1] + k + D::kStep);
      }
      BATON_UNROLL
      for (int n = 0; n < kPairFeatures; ++n) {
        BATON_UNROLL
        for (int half = 0; half < 2; ++half) {
          const typename D::Operand w = D::twice(weight + n * stride + k + half * D::kStep);
          BATON_UNROLL
          for (int m = 0; m < kPairs; ++m) sums[m][n] = D::step(v[m][half], w, sums[m][n]);
        }
      }
    }
    for (; k >= whole && k < p.in_features; k += D::kStep) {
      const int64_t rest = p.in_features - k < D::kStep ? p.in_features - k : D::kStep;
      BATON_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        const typename D::Operand v = D::rows(x[2 * m] + k, x[2 * m + 1] + k, rest);
        BATON_UNROLL
        for (int n = 0; n < kPairFeatures; ++n) {
          sums[m][n] = D::step(v, D::twice(weight + n * stride + k, rest), sums[m][n]);
        }
      }
    }
    const bool last = k >= p.in_features;
    if (begin > 0) {
      BATON_UNROLL
      for (int m = 0; m < kPairs; ++m) {
        BATON_UNROLL
        for (int n = 0; n < kPairFeatures; ++n) sums[m][n] = earlier[m][n] + sums[m][n];
      }
    }
    if (last) break;
    BATON_UNROLL
    for (int m = 0; m < kPairs; ++m) {
      BATON_UNROLL
      for (int n = 0; n < kPairFeatures; ++n) earlier[m][n] = sums[m][n];
    }
  }
  Vec bias = zero();
  if (p.bias) {
    for (int i = 0; i < kLanes; ++i) {
      bias[i] = to_float(static_cast<const T*>(p.bias)[feature + i % kPairFeatures]);
    }
  }
  T* y = static_cast<T*>(p.y) + row * p.out_features + feature;
  BATON_UNROLL
  for (int m = 0; m < kPairs; ++m, y += 2 * p.out_features) {
    alignas(64) T result[kLanes];
    store(result, fold_pair(sums[m]) + bias);
    __builtin_memcpy(y, result, kPairFeatures * sizeof(T));
    if (row + 2 * m + 1 < row_end) {
      __builtin_memcpy(y + p.out_features, result + kPairFeatures, kPairFeatures * sizeof(T));
    }
  }
}

// y for rows [row, row_end) and eight features: three pairs of rows share a pass over the weights.
template <typename T>
void pair_column(const LinearParams& p, int64_t row, int64_t row_end, int64_t feature) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t passes = (row_end - row + 2 * kTilePairs - 1) / (2 * kTilePairs);
  WeightsAhead ahead{0, passes * kLine};
  for (; row < row_end; row += 2 * kTilePairs, ahead.next += kLine) {
    const int64_t rows = row_end - row;
    if (rows > 4) {
      pair_tile<T, 3>(p, row, row_end, feature, ahead);
    } else if (rows > 2) {
      pair_tile<T, 2>(p, row, row_end, feature, ahead);
    } else {
      pair_tile<T, 1>(p, row, row_end, feature, ahead);
    }
  }
}

}  // namespace baton::cpu::BATON_ISA

#endif  // __AVX512F__
