// One step of a dot product along a contiguous dimension, for every storage type: shared by linear
// and by the scores of ragged_attention.
#pragma once

#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// Multiplies kStep elements of each operand and adds the products into the lanes of a float sum.
template <typename T>
struct Dot {
  static constexpr int kStep = kLanes;
  typedef Vec Operand;
  static BATON_INLINE Operand operand(const T* p) { return load(p); }
  static BATON_INLINE Operand operand_partial(const T* p, int64_t n) { return load_partial(p, n); }
  static BATON_INLINE Vec step(Operand a, Operand b, Vec sum) { return fmadd(a, b, sum); }
};

#if defined(__AVX512BF16__)
// One instruction sums pairs of bfloat16 products in float32.
template <>
struct Dot<BFloat16> {
  static constexpr int kStep = 32;
  typedef __m512i Operand;
  static BATON_INLINE Operand operand(const BFloat16* p) { return _mm512_loadu_si512(p); }
  static BATON_INLINE Operand operand_partial(const BFloat16* p, int64_t n) {
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
  static BATON_INLINE Vec step(Operand a, Operand b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

}  // namespace baton::cpu::BATON_ISA
