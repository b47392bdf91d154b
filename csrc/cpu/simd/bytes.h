// Dot products of int8: four products per lane of an int32 sum. Everything is exact, so every
// instruction set computes the same sums.
#pragma once

#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

#if defined(__AVX512VNNI__)

// The CPU multiplies unsigned with signed bytes: kByteOffset is added to the first operand, which
// adds kByteOffset times the sum of the second operand to the result.
constexpr int32_t kByteOffset = 128;

typedef IntVec ByteWeights;
typedef IntVec ByteFactor;

BATON_INLINE ByteWeights load_byte_weights(const void* p) {
  UintVec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return (IntVec)(x ^ 0x80808080u);
}
BATON_INLINE ByteFactor broadcast_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return (IntVec)_mm512_set1_epi32(four);
}
BATON_INLINE IntVec dot_bytes(IntVec sum, ByteWeights weights, ByteFactor factor) {
  return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)factor);
}

#else

constexpr int32_t kByteOffset = 0;

typedef int16_t WordVec __attribute__((vector_size(kLanes * 4)));

// The even and the odd bytes as words: the instructions for bytes add two products in 16 bits,
// where they may not fit.
struct ByteWords {
  WordVec even, odd;
};
typedef ByteWords ByteWeights;
typedef ByteWords ByteFactor;

BATON_INLINE ByteWords words_of(WordVec bytes) { return {bytes << 8 >> 8, bytes >> 8}; }

BATON_INLINE ByteWeights load_byte_weights(const void* p) {
  WordVec bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return words_of(bytes);
}
BATON_INLINE ByteFactor broadcast_bytes(const int8_t* p) {
  int32_t four;
  __builtin_memcpy(&four, p, sizeof(four));
  return words_of((WordVec)(four - IntVec{}));
}

// Each lane gets the sum of its two products of words.
BATON_INLINE IntVec multiply_words(WordVec a, WordVec b) {
#if defined(__AVX512F__)
  return (IntVec)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (IntVec)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (IntVec)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const IntVec x = (IntVec)a, y = (IntVec)b;
  return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

BATON_INLINE IntVec dot_bytes(IntVec sum, ByteWeights weights, ByteFactor factor) {
  return sum + multiply_words(weights.even, factor.even) + multiply_words(weights.odd, factor.odd);
}

#endif

// Stores the lowest byte of each lane.
BATON_INLINE void store_bytes(int8_t* p, IntVec x) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(x[i]);
#endif
}

// The largest lane, and the sum of all lanes.
BATON_INLINE int32_t reduce_max(IntVec x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)x);
#else
  int32_t most = x[0];
  for (int i = 1; i < kLanes; ++i) most = x[i] > most ? x[i] : most;
  return most;
#endif
}
BATON_INLINE uint32_t reduce_sum(UintVec x) {
#if defined(__AVX512F__)
  return static_cast<uint32_t>(_mm512_reduce_add_epi32((__m512i)x));
#else
  uint32_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
#endif
}

BATON_INLINE Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }

}  // namespace baton::cpu::BATON_ISA
