// exp and tanh of vectors, the same bits in every lane.
#pragma once

#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// exp(x) to about one unit in the last place: x log2(e) = n + r, |r| <= 1/2, a polynomial for 2^r.
// Results below 1.3e-38, about the smallest normal float, are 0, as exp(-inf) is; NaN stays NaN.
BATON_INLINE Vec exp(Vec x) {
  // Subnormal results, and those that round to 0, would take 30 times as long, and hidden keys
  // produce many of them. Above the other bound the result is infinity anyway.
  const Vec low = set1(-87.3f);
#if defined(__AVX512F__)
  const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, (__m512)low, _CMP_NLT_UQ);
#else
  const UintVec is_normal = ~(UintVec)(x < low);
#endif
  x = clamp(x, low, set1(89.0f));
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low mantissa bits.
  const Vec magic = set1(12582912.0f);
  const Vec shifted = fmadd(x, set1(1.44269502f), magic);
  const Vec n = shifted - magic;
  // log2(e) in two parts, so that r loses nothing where n is large.
  Vec r = fmadd(x, set1(1.44269502f), -n);
  r = fmadd(x, set1(1.92596299e-8f), r);
  Vec p = set1(1.54614447e-4f);
  p = fmadd(p, r, set1(1.34004282e-3f));
  p = fmadd(p, r, set1(9.61805668e-3f));
  p = fmadd(p, r, set1(5.55032723e-2f));
  p = fmadd(p, r, set1(2.40226509e-1f));
  p = fmadd(p, r, set1(6.93147207e-1f));
  p = fmadd(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return (Vec)_mm512_maskz_scalef_ps(is_normal, (__m512)p, (__m512)n);
#else
  // 2^n as two factors, because 2^128 is not a float.
  const IntVec exponent = (IntVec)as_bits(shifted) - 0x4b400000;
  const IntVec first = exponent >> 1, second = exponent - first;
  const Vec scaled =
      p * as_float((UintVec)(first + 127) << 23) * as_float((UintVec)(second + 127) << 23);
  return as_float(as_bits(scaled) & is_normal);
#endif
}

// 1 / (1 + exp(-x)), as a factor of a result that is rounded to T.
template <typename T>
BATON_INLINE Vec sigmoid(Vec x) {
  return set1(1.0f) / (set1(1.0f) + exp(-x));
}

#if defined(__AVX512F__)
// Accurate to 14 bits, of which the result keeps 8: a division takes as long as all of this.
template <>
BATON_INLINE Vec sigmoid<BFloat16>(Vec x) {
  // 2^129 is infinity, whose reciprocal is 0.
  const Vec t = clamp(x * set1(-1.44269502f), set1(-150.0f), set1(129.0f));
  const Vec n = (Vec)_mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
  const Vec r = t - n;
  Vec p = set1(9.57010361e-3f);
  p = fmadd(p, r, set1(5.59179042e-2f));
  p = fmadd(p, r, set1(2.40247451e-1f));
  p = fmadd(p, r, set1(6.93121809e-1f));
  p = fmadd(p, r, set1(9.99999261e-1f));
  const __m512 power = _mm512_scalef_ps((__m512)p, (__m512)n);
  return (Vec)_mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1.0f)));
}
#endif

// tanh(x); a polynomial near 0, where 1 - 2 / (exp(2 x) + 1) would cancel.
BATON_INLINE Vec tanh(Vec x) {
  const Vec magnitude = as_float(as_bits(x) & 0x7fffffffu);
  const Vec far = set1(1.0f) - set1(2.0f) / (exp(magnitude + magnitude) + set1(1.0f));
  const Vec square = x * x;
  Vec p = set1(-5.70498872745e-3f);
  p = fmadd(p, square, set1(2.06390887954e-2f));
  p = fmadd(p, square, set1(-5.37397155531e-2f));
  p = fmadd(p, square, set1(1.33314422036e-1f));
  p = fmadd(p, square, set1(-3.33332819422e-1f));
  const Vec near = fmadd(p * square, x, x);
  const Vec signed_far = as_float(as_bits(far) | (as_bits(x) & 0x80000000u));
  return magnitude < set1(0.625f) ? near : signed_far;
}

}  // namespace baton::cpu::BATON_ISA
