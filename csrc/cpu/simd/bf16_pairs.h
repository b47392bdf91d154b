// Vectors of bfloat16 pairs, for CPUs that multiply pairs into float32 sums.
#pragma once

#include "cpu/simd/simd.h"

#if defined(__AVX512BF16__)

namespace baton::cpu::BATON_ISA {

typedef __m512i Pairs;  // 16 pairs of bfloat16

BATON_INLINE Vec dot_pairs(Vec sum, Pairs a, Pairs b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

BATON_INLINE Pairs load_pairs(const void* p) { return _mm512_loadu_si512(p); }
BATON_INLINE Pairs load_pairs(const BFloat16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}
BATON_INLINE Pairs broadcast_pair(const void* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

constexpr int kPairStep = 32;  // elements of one vector of bfloat16

// A pair of rows of values, 32 elements each: [pairs of elements 0-3, 8-11, ..], [4-7, 12-15, ..].
struct ValuePairs {
  Pairs low, high;
};

BATON_INLINE ValuePairs interleave(Pairs even, Pairs odd) {
  return {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
}

}  // namespace baton::cpu::BATON_ISA

#endif  // __AVX512BF16__
