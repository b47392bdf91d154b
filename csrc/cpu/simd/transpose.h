// Vectors of 32-bit elements as the rows of small matrices: transposition, of the whole or within
// parts of four lanes. Elements are only moved, never computed with: they may be bfloat16 pairs.
#pragma once

#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// A part of a vector is four 32-bit lanes: 128 bits.
constexpr int kParts = kLanes / 4;

// Within every part, rows[i][j] <- rows[j][i] for four vectors of 32-bit elements.
BATON_INLINE void transpose_parts(Vec& w, Vec& x, Vec& y, Vec& z) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  typedef __m512 V;
#define BATON_SHUFFLE(name) _mm512_##name
#elif defined(__AVX2__)
  typedef __m256 V;
#define BATON_SHUFFLE(name) _mm256_##name
#else
  typedef __m128 V;
#define BATON_SHUFFLE(name) _mm_##name
#endif
  const V a = (V)w, b = (V)x, c = (V)y, d = (V)z;
  const V ab_low = BATON_SHUFFLE(unpacklo_ps)(a, b), ab_high = BATON_SHUFFLE(unpackhi_ps)(a, b);
  const V cd_low = BATON_SHUFFLE(unpacklo_ps)(c, d), cd_high = BATON_SHUFFLE(unpackhi_ps)(c, d);
  w = (Vec)BATON_SHUFFLE(shuffle_ps)(ab_low, cd_low, 0x44);
  x = (Vec)BATON_SHUFFLE(shuffle_ps)(ab_low, cd_low, 0xee);
  y = (Vec)BATON_SHUFFLE(shuffle_ps)(ab_high, cd_high, 0x44);
  z = (Vec)BATON_SHUFFLE(shuffle_ps)(ab_high, cd_high, 0xee);
#undef BATON_SHUFFLE
#else
  static_assert(kLanes == 4);
  Vec* const rows[4] = {&w, &x, &y, &z};
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < i; ++j) {
      const float value = (*rows[i])[j];
      (*rows[i])[j] = (*rows[j])[i];
      (*rows[j])[i] = value;
    }
  }
#endif
}

// Copies lane kLane of every part to all four lanes of the part.
template <int kLane>
BATON_INLINE Vec repeat_in_parts(Vec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_permute_ps((__m512)x, kLane * 0x55);
#elif defined(__AVX2__)
  return (Vec)_mm256_permute_ps((__m256)x, kLane * 0x55);
#else
  return Vec{x[kLane], x[kLane], x[kLane], x[kLane]};
#endif
}

// Part i of the vector.
template <int kPart>
BATON_INLINE Quad part(Vec x) {
#if defined(__AVX512F__)
  return (Quad)_mm512_extractf32x4_ps((__m512)x, kPart);
#elif defined(__AVX2__)
  return (Quad)_mm256_extractf128_ps((__m256)x, kPart);
#else
  static_assert(kPart == 0);
  return x;
#endif
}

// rows[i][j] <- rows[j][i] for kLanes vectors of 32-bit elements.
BATON_INLINE void transpose(Vec (&rows)[kLanes]) {
  BATON_UNROLL
  for (int i = 0; i < kLanes; i += 4) {
    transpose_parts(rows[i], rows[i + 1], rows[i + 2], rows[i + 3]);
  }
  // Then transpose the parts among each other.
#if defined(__AVX512F__)
  Vec parts[kLanes];
  BATON_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m512 a = (__m512)rows[j], b = (__m512)rows[4 + j];
    const __m512 c = (__m512)rows[8 + j], d = (__m512)rows[12 + j];
    const __m512 ab_even = _mm512_shuffle_f32x4(a, b, 0x88),
                 ab_odd = _mm512_shuffle_f32x4(a, b, 0xdd);
    const __m512 cd_even = _mm512_shuffle_f32x4(c, d, 0x88),
                 cd_odd = _mm512_shuffle_f32x4(c, d, 0xdd);
    parts[j] = (Vec)_mm512_shuffle_f32x4(ab_even, cd_even, 0x88);
    parts[8 + j] = (Vec)_mm512_shuffle_f32x4(ab_even, cd_even, 0xdd);
    parts[4 + j] = (Vec)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0x88);
    parts[12 + j] = (Vec)_mm512_shuffle_f32x4(ab_odd, cd_odd, 0xdd);
  }
  BATON_UNROLL
  for (int i = 0; i < kLanes; ++i) rows[i] = parts[i];
#elif defined(__AVX2__)
  BATON_UNROLL
  for (int j = 0; j < 4; ++j) {
    const __m256 a = (__m256)rows[j], b = (__m256)rows[4 + j];
    rows[j] = (Vec)_mm256_permute2f128_ps(a, b, 0x20);
    rows[4 + j] = (Vec)_mm256_permute2f128_ps(a, b, 0x31);
  }
#endif
}

}  // namespace baton::cpu::BATON_ISA
