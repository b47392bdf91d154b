// One vector type for every instruction set. The kernels in this folder are compiled once per set,
// with BATON_ISA naming their namespace, and use float lanes only; this header is the only file
// with general intrinsics.
//
// Contract: load and store convert between the storage type and float; *_partial touches exactly n
// elements and reads the missing lanes as 0; every reduction has one fixed order. Nothing here
// comes from the C++ standard library: a function it inlines elsewhere could otherwise be linked in
// with instructions that the running CPU lacks.
#pragma once

#include <cstdint>

#include "common/dtype.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(BATON_ISA)
#error "compile csrc/cpu with -DBATON_ISA=<name of the instruction set>"
#endif

#define BATON_INLINE inline __attribute__((always_inline))
#define BATON_INLINE_LAMBDA __attribute__((always_inline))
// Loops over a register tile must be unrolled completely, or the tile lives in memory.
#define BATON_UNROLL _Pragma("GCC unroll 16")

namespace baton::cpu::BATON_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));

BATON_INLINE Vec set1(float x) { return x - Vec{}; }
BATON_INLINE Vec zero() { return Vec{}; }
BATON_INLINE Vec as_float(UintVec x) { return reinterpret_cast<Vec>(x); }
BATON_INLINE UintVec as_bits(Vec x) { return reinterpret_cast<UintVec>(x); }

BATON_INLINE Vec max(Vec a, Vec b) { return a > b ? a : b; }

// x clamped to [low, high]; NaN passes through. The intrinsics return their second operand for NaN;
// the compiler does not derive them from the comparisons.
BATON_INLINE Vec clamp(Vec x, Vec low, Vec high) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)x));
#else
  x = x < low ? low : x;
  return x > high ? high : x;
#endif
}

// a * b + c. Explicit, because contraction left to the compiler could differ between two inlined
// copies of a kernel and with it the bits of a row.
BATON_INLINE Vec fmadd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// Sum of the lanes, by folding halves onto each other. reduce_add4 does the same for four vectors
// at once, in fewer instructions and with the same order of additions.
BATON_INLINE Quad fold_to_quad(Vec x) {
#if defined(__AVX512F__)
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  return (Quad)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  return (Quad)_mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  return x;
#endif
}

BATON_INLINE float reduce_add(Vec x) {
  const Quad q = fold_to_quad(x);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

#if defined(__AVX512F__)
// Lanes 4 i .. 4 i + 3 of the result: four partial sums of x[i], folded as reduce_add4 does.
BATON_INLINE __m512 fold_four(const Vec (&x)[4]) {
  const auto fold = [](__m512 a, __m512 b) BATON_INLINE_LAMBDA {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const __m512 low = fold((__m512)x[0], (__m512)x[1]), high = fold((__m512)x[2], (__m512)x[3]);
  return _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88),
                       _mm512_shuffle_f32x4(low, high, 0xdd));
}
#endif

BATON_INLINE Quad reduce_add4(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const Vec four[4] = {a, b, c, d};
  __m512 quads = fold_four(four);
  quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0x4e));
  quads = _mm512_add_ps(quads, _mm512_permute_ps(quads, 0xb1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return (Quad)_mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, quads));
#elif defined(__x86_64__)
  const __m128 qa = (__m128)fold_to_quad(a), qb = (__m128)fold_to_quad(b);
  const __m128 qc = (__m128)fold_to_quad(c), qd = (__m128)fold_to_quad(d);
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(qa, qb), _mm_unpackhi_ps(qa, qb));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(qc, qd), _mm_unpackhi_ps(qc, qd));
  return (Quad)_mm_add_ps(_mm_shuffle_ps(ab, cd, 0x44), _mm_shuffle_ps(ab, cd, 0xee));
#else
  return Quad{reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d)};
#endif
}

BATON_INLINE float reduce_max(Vec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < kLanes; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// Whether a comparison holds in any lane.
BATON_INLINE bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// Loads.
BATON_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}

// Convert between 16 and 32 bits; narrow takes values below 2^16. GCC 12 compiles
// __builtin_convertvector to five instructions where one would do.
BATON_INLINE UintVec widen(ShortVec x) {
#if defined(__AVX512F__)
  return (UintVec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (UintVec)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, UintVec);
#endif
}

BATON_INLINE ShortVec narrow(UintVec x) {
#if defined(__AVX512F__)
  return (ShortVec)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);
  return (ShortVec)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  return __builtin_convertvector(x, ShortVec);
#endif
}

BATON_INLINE Vec from_bfloat16(ShortVec x) { return as_float(widen(x) << 16); }

BATON_INLINE Vec load(const BFloat16* p) {
  ShortVec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return from_bfloat16(x);
}

BATON_INLINE Vec from_half(ShortVec x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__)
  return (Vec)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)x));
#else
  // Exponent and mantissa move into place by one multiplication, which also normalizes subnormals;
  // infinities and NaN get the exponent that the multiplication cannot give them.
  const UintVec bits = widen(x);
  const UintVec sign = (bits & 0x8000u) << 16;
  const Vec scaled = as_float((bits & 0x7fffu) << 13) * set1(0x1p112f);
  const UintVec special = (bits & 0x7c00u) == 0x7c00u;
  return as_float(as_bits(scaled) | sign | (special & 0x7f800000u));
#endif
}

BATON_INLINE Vec load(const Half* p) {
  ShortVec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return from_half(x);
}

template <typename T>
BATON_INLINE Vec load_partial(const T* p, int64_t n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  }
#endif
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}

// Stores, rounding to nearest even.
BATON_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

BATON_INLINE ShortVec round_to_bfloat16(Vec x) {
  const UintVec bits = as_bits(x);
  const UintVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const UintVec quiet_nan = bits | 0x400000u;
  return narrow((x == x ? rounded : quiet_nan) >> 16);
}

BATON_INLINE ShortVec to_bfloat16(Vec x) {
#if defined(__AVX512BF16__)
  // The CPU's own conversion flushes subnormal numbers to 0, so they take the slow way.
  constexpr int kSubnormal = 0x20;
  if (__builtin_expect(_mm512_fpclass_ps_mask((__m512)x, kSubnormal) == 0, true)) {
    return (ShortVec)_mm512_cvtneps_pbh((__m512)x);
  }
#endif
  return round_to_bfloat16(x);
}

BATON_INLINE void store(BFloat16* p, Vec x) {
  const ShortVec bits = to_bfloat16(x);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

BATON_INLINE ShortVec to_half(Vec x) {
#if defined(__AVX512F__)
  return (ShortVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (ShortVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__aarch64__)
  return (ShortVec)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)x));
#else
  const UintVec bits = as_bits(x);
  const UintVec sign = (bits >> 16) & 0x8000u;
  const UintVec magnitude = bits & 0x7fffffffu;
  // Normal results: rebias the exponent, round to nearest even on the 13 bits that are dropped.
  const UintVec normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Subnormal results: adding 0.5 lets the float adder round at the last half bit.
  const UintVec subnormal = as_bits(as_float(magnitude) + set1(0.5f)) - 0x3f000000u;
  const UintVec is_subnormal = (UintVec)(magnitude < 0x38800000u);
  const UintVec overflows = (UintVec)(magnitude >= 0x477ff000u);
  const UintVec is_nan = (UintVec)(magnitude > 0x7f800000u);
  UintVec half = is_subnormal & subnormal | ~is_subnormal & normal;
  half = overflows & 0x7c00u | ~overflows & half;
  half = is_nan & (0x7e00u | (magnitude >> 13 & 0x3ffu)) | ~is_nan & half;
  return narrow(half | sign);
#endif
}

BATON_INLINE void store(Half* p, Vec x) {
  const ShortVec bits = to_half(x);
  __builtin_memcpy(p, &bits, sizeof(bits));
}

template <typename T>
BATON_INLINE void store_partial(T* p, Vec x, int64_t n) {
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}

// x after a round trip through T.
template <typename T>
BATON_INLINE Vec round_to(Vec x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T buffer[kLanes];
    store(buffer, x);
    return load(buffer);
  }
}

template <typename T>
BATON_INLINE float to_float(T x) {
  return load_partial(&x, 1)[0];
}
BATON_INLINE float to_float(float x) { return x; }

}  // namespace baton::cpu::BATON_ISA
