// Register tiles over the panels of linear_packed: how one step of a panel is multiplied with
// several rows of x, for every storage type and length of vectors.
//
// A step is one element of in_features, or a pair of them, for all 48 outputs of a panel. Lanes run
// along outputs, so that an element of the product has its lane to itself: it adds its terms one by
// one, in the order of in_features, whatever rows and panels share the tile.
#pragma once

#include "common/linear_packed.h"
#include "cpu/simd/bf16_pairs.h"
#include "cpu/simd/bytes.h"
#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// What a panel of T looks like, and what its steps multiply: elements of x as they are, or
// converted to float before (`Factor`).
template <typename T>
struct Panel {
  typedef T Input;   // elements of x
  typedef T Output;  // of y and bias
  typedef Vec Sum;
  static constexpr int kTerms = 1;
  static constexpr int64_t kVectorBytes = kLanes * sizeof(T);
  // Steps that are added up one after the other: one chain of additions over all of in_features
  // rounds too much. Results of 16 bits are rounded more than that by themselves.
  static constexpr int64_t kChainSteps = sizeof(T) == 4 ? 64 : 256;
  typedef float Factor;

  template <int kRows, int kVectors>
  static BATON_INLINE void step(Vec (&sums)[kRows][kVectors],
                                const char* const (&weights)[kVectors], const float* x,
                                int64_t x_row_stride) {
    Vec w[kVectors];
    BATON_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load(reinterpret_cast<const T*>(weights[v]));
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Vec factor = set1(x[m * x_row_stride]);
      BATON_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[m][v] = fmadd(w[v], factor, sums[m][v]);
    }
  }
};

template <>
struct Panel<BFloat16> {
  typedef BFloat16 Input, Output;
  typedef Vec Sum;
  static constexpr int kTerms = 2;
  static constexpr int64_t kVectorBytes = kLanes * 4;
  static constexpr int64_t kChainSteps = 256;
#if defined(__AVX512BF16__)
  typedef BFloat16 Factor;

  template <int kRows, int kVectors>
  static BATON_INLINE void step(Vec (&sums)[kRows][kVectors],
                                const char* const (&weights)[kVectors], const BFloat16* x,
                                int64_t x_row_stride) {
    Pairs w[kVectors];
    BATON_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load_pairs(weights[v]);
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const Pairs factor = broadcast_pair(x + m * x_row_stride);
      BATON_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[m][v] = dot_pairs(sums[m][v], w[v], factor);
    }
  }
#else
  typedef float Factor;

  template <int kRows, int kVectors>
  static BATON_INLINE void step(Vec (&sums)[kRows][kVectors],
                                const char* const (&weights)[kVectors], const float* x,
                                int64_t x_row_stride) {
    BATON_UNROLL
    for (int term = 0; term < kTerms; ++term) {
      Vec w[kVectors];
      BATON_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        UintVec pairs;
        __builtin_memcpy(&pairs, weights[v], sizeof(pairs));
        w[v] = as_float(term == 0 ? pairs << 16 : pairs & 0xffff0000u);
      }
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const Vec factor = set1(x[m * x_row_stride + term]);
        BATON_UNROLL
        for (int v = 0; v < kVectors; ++v) sums[m][v] = fmadd(w[v], factor, sums[m][v]);
      }
    }
  }
#endif
};

// int8 with scales; T is the type of y. Integer sums are exact: chains here only keep a panel's
// share in the cache.
template <typename T>
struct Int8Panel {
  typedef int8_t Input, Factor;
  typedef T Output;
  typedef IntVec Sum;
  static constexpr int kTerms = 4;
  static constexpr int64_t kVectorBytes = kLanes * 4;
  static constexpr int64_t kChainSteps = 512;

  template <int kRows, int kVectors>
  static BATON_INLINE void step(IntVec (&sums)[kRows][kVectors],
                                const char* const (&weights)[kVectors], const int8_t* x,
                                int64_t x_row_stride) {
    ByteWeights w[kVectors];
    BATON_UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load_byte_weights(weights[v]);
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const ByteFactor factor = broadcast_bytes(x + m * x_row_stride);
      BATON_UNROLL
      for (int v = 0; v < kVectors; ++v) sums[m][v] = dot_bytes(sums[m][v], w[v], factor);
    }
  }
};

// y and bias of kLanes outputs, or of the first few.
template <typename T>
BATON_INLINE Vec load_some(const T* p, int64_t count) {
  return count < kLanes ? load_partial(p, count) : load(p);
}
template <typename T>
BATON_INLINE void store_some(T* p, Vec x, int64_t count) {
  if (count < kLanes) {
    store_partial(p, x, count);
  } else {
    store(p, x);
  }
}

// The products of a row with kLanes outputs: exact sums times both scales. No fused operation,
// which not every CPU has.
BATON_INLINE Vec dequantized(IntVec sums, const QuantizedRow& row, Vec weight_scales) {
  return to_float(sums) * (set1(row.scale) * weight_scales);
}

}  // namespace baton::cpu::BATON_ISA
