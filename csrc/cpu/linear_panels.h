// Register tiles over the panels of linear_packed: how one step of a panel is multiplied with
// several rows of x, for every storage type and vector length.
//
// A step is one element of in_features, or a pair of them, for all 48 outputs of a panel. Lanes run
// along the outputs, so every element of the product has its own lane and adds its terms one by
// one, in the order of in_features, no matter which rows and panels share the tile.
#pragma once

#include "common/linear_packed.h"
#include "cpu/simd/bf16_pairs.h"
#include "cpu/simd/bytes.h"
#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// The layout of a panel of T, and what its steps multiply: elements of x unchanged, or converted to
// float first (`Factor`).
template <typename T>
struct Panel {
  typedef T Input;  // elements of x
  typedef Vec Sum;
  static constexpr int kTerms = 1;
  static constexpr int64_t kVectorBytes = kLanes * sizeof(T);
  // The number of steps in one chain of additions: a single chain over all of in_features would
  // round too much. 16-bit results lose more than that to their own rounding.
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
  typedef BFloat16 Input;
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

// Four int8 elements per output, multiplied with int8 rows of x.
struct Int8Panel {
  typedef int8_t Input, Factor;
  typedef IntVec Sum;
  static constexpr int kTerms = 4;
  static constexpr int64_t kVectorBytes = kLanes * 4;
  // Groups of x are added up one after the other in any case: chains only serve to keep a panel's
  // share in the cache.
  static constexpr int64_t kChainSteps = 512;
  static constexpr int64_t kGroupSteps = kInt8Group / kTerms;
  static_assert(kChainSteps % kGroupSteps == 0);

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

  // A group's sums in float32. Not fused with the addition: see common/linear_packed.h.
  static BATON_INLINE Vec scaled(IntVec sums, const QuantizedGroup& group) {
    return to_float(sums) * set1(group.scale);
  }
};

// The weight's scales of kLanes outputs; arbitrary where outputs do not exist.
BATON_INLINE Vec load_scales(const LinearPackedParams& p, int64_t output) {
  const int64_t rest = p.out_features - output;
  if (rest <= 0) return zero();
  return rest < kLanes ? load_partial(p.weight_scales + output, rest)
                       : load(p.weight_scales + output);
}

// The total over all groups, times those scales.
BATON_INLINE Vec with_scales(Vec total, Vec scales) { return total * scales * set1(kInt8Headroom); }

// Writes y for rows [row, row + num_rows) and kLanes outputs from `output` on: results + bias, in
// y's dtype. Rows of results are `stride` vectors apart; outputs that do not exist are left out.
inline void write_results(const LinearPackedParams& p, int64_t row, int64_t num_rows,
                          int64_t output, const Vec* results, int64_t stride) {
  const int64_t rest = p.out_features - output;
  if (rest <= 0) return;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    T* y = static_cast<T*>(p.y) + row * p.out_features + output;
    const T* bias = p.bias ? static_cast<const T*>(p.bias) + output : nullptr;
    const auto write = [&](const auto& load_one, const auto& store_one) BATON_INLINE_LAMBDA {
      const Vec more = bias ? load_one(bias) : zero();
      for (int64_t m = 0; m < num_rows; ++m, y += p.out_features, results += stride) {
        store_one(y, bias ? *results + more : *results);
      }
    };
    if (rest >= kLanes) {
      write([](const T* from) { return load(from); }, [](T* to, Vec x) { store(to, x); });
    } else {
      write([&](const T* from) { return load_partial(from, rest); },
            [&](T* to, Vec x) { store_partial(to, x, rest); });
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
