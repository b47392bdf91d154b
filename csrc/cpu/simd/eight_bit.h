// Eight-bit elements: conversion to floats, and rounding of a token's floats to them
// (common/kv_scales.h).
#pragma once

#include "common/kv_scales.h"
#include "cpu/simd/bf16_pairs.h"

namespace baton::cpu::BATON_ISA {

// Loads kLanes elements; the conversion is exact.
BATON_INLINE Vec load(const Int8* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i].bits;
  return x;
#endif
}

BATON_INLINE UintVec load_bits(const Float8* p) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (UintVec)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  UintVec x;
  for (int i = 0; i < kLanes; ++i) x[i] = p[i].bits;
  return x;
#endif
}

BATON_INLINE Vec load(const Float8* p) {
  const UintVec bits = load_bits(p), magnitude = bits & 0x7fu;
  // Subnormal numbers are multiples of 2^-9. They are computed without subnormal floats, because a
  // thread may be set to flush those to 0.
  const Vec subnormal = __builtin_convertvector((IntVec)magnitude, Vec) * set1(0x1p-9f);
  const UintVec normal = (magnitude << 20) + (120u << 23);
  UintVec x = (UintVec)(magnitude < 8u ? as_bits(subnormal) : normal);
  x = magnitude == 0x7fu ? UintVec{} + 0x7fc00000u : x;
  return as_float(x | (bits & 0x80u) << 24);
}

// out[i] = in[i] as a T, which can represent every element; dim is a multiple of 8.
template <typename T, typename S>
BATON_INLINE void widen(const S* in, int64_t dim, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(out + i, load(in + i));
  if (i == dim) return;
  S rest[kLanes] = {};
  __builtin_memcpy(rest, in + i, dim - i);
  store_partial(out + i, load(rest), dim - i);
}

#if defined(__AVX512BF16__)

// 32 elements as bfloat16.
BATON_INLINE __m512i to_bfloat16(__m256i bytes, Int8) {
  const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes));
  const __m512i high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));
}

BATON_INLINE __m512i to_bfloat16(__m256i bytes, Float8) {
  // The eight subnormal numbers, looked up by their low three bits.
  const __m512i subnormals = _mm512_set4_epi64(0, 0, 0x3c603c403c203c00, 0x3bc03b803b000000);
  const __m512i words = _mm512_cvtepu8_epi16(bytes);
  const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(words, magnitude), 8);
  __m512i x = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  const __mmask32 is_subnormal = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  x = _mm512_mask_permutexvar_epi16(x, is_subnormal, magnitude, subnormals);
  const __mmask32 is_nan = _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f));
  x = _mm512_mask_blend_epi16(is_nan, x, _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(x, sign);
}

template <typename S>
BATON_INLINE void widen(const S* in, int64_t dim, BFloat16* out) {
  int64_t i = 0;
  for (; i + kPairStep <= dim; i += kPairStep) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i));
    _mm512_storeu_si512(out + i, to_bfloat16(bytes, S{}));
  }
  if (i == dim) return;
  const auto rest = static_cast<__mmask32>((uint64_t{1} << (dim - i)) - 1);
  _mm512_mask_storeu_epi16(out + i, rest, to_bfloat16(_mm256_maskz_loadu_epi8(rest, in + i), S{}));
}

#endif  // __AVX512BF16__

// out[i] = in[i] * scale, rounded to T.
template <typename T, typename S>
static inline void dequantize(const S* in, float scale, int64_t dim, T* out) {
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i < kLanes ? dim - i : kLanes;
    S part[kLanes] = {};
    __builtin_memcpy(part, in + i, n);
    const Vec x = load(part) * set1(scale);
    if (n == kLanes) {
      store(out + i, x);
    } else {
      store_partial(out + i, x, n);
    }
  }
}

// The bits of the Int8 or Float8 nearest to x, in the low byte of each lane. |x| may exceed their
// largest number only by a rounding error.
BATON_INLINE UintVec round_to(Vec x, Int8) {
  constexpr float kShift = 0x1.8p23f;  // its unit in the last place is 1
  IntVec rounded = (IntVec)(as_bits(x + set1(kShift)) - as_bits(set1(kShift)));
  rounded = rounded > 127 ? IntVec{} + 127 : rounded;
  rounded = rounded < -127 ? IntVec{} - 127 : rounded;
  return (UintVec)rounded;
}

BATON_INLINE UintVec round_to(Vec x, Float8) {
  const UintVec bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  // Below 2^-6, the smallest normal number: in units of 2^-9, the last place of kShift.
  constexpr float kShift = 0x1.8p14f;
  const UintVec subnormal = as_bits(as_float(magnitude) + set1(kShift)) - as_bits(set1(kShift));
  const UintVec normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  UintVec code = magnitude < 0x3c800000u ? subnormal : normal;
  code = code > 0x7eu ? UintVec{} + 0x7eu : code;
  return code | ((bits >> 24) & 0x80u);
}

static inline float top_of(Int8) { return 127.0f; }
static inline float top_of(Float8) { return 448.0f; }

// Writes the elements of one token and head; returns their scale.
template <typename T, typename S>
static inline float quantize(const T* x, int64_t dim, S* out) {
  const auto part = [&](int64_t i) BATON_INLINE_LAMBDA {
    return dim - i >= kLanes ? load(x + i) : load_partial(x + i, dim - i);
  };
  // The maximum magnitude, by bits: they sort like the numbers, then infinity, then NaN.
  IntVec top{};
  for (int64_t i = 0; i < dim; i += kLanes) {
    const IntVec magnitude = (IntVec)(as_bits(part(i)) & 0x7fffffffu);
    top = magnitude > top ? magnitude : top;
  }
  int32_t most = 0;
  for (int i = 0; i < kLanes; ++i) most = top[i] > most ? top[i] : most;
  float amax;
  __builtin_memcpy(&amax, &most, sizeof(amax));
  const bool is_finite = most < 0x7f800000;
  const float scale = amax / top_of(S{});
  if (!is_finite || scale < 0x1p-126f) {
    __builtin_memset(out, 0, dim);
    return is_finite ? 0.0f : __builtin_nanf("");
  }
  for (int64_t i = 0; i < dim; i += kLanes) {
    const UintVec rounded = round_to(part(i) / set1(scale), S{});
    uint8_t bytes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) bytes[lane] = static_cast<uint8_t>(rounded[lane]);
    __builtin_memcpy(out + i, bytes, dim - i < kLanes ? dim - i : kLanes);
  }
  return scale;
}

}  // namespace baton::cpu::BATON_ISA
