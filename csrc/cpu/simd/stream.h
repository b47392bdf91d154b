// Stores that bypass the caches, for data that is read much later, if at all by this core. A store
// through the caches would fetch its line first, which is wasted on such data.
#pragma once

#include <cstdint>

#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

// A result of at least this size has left the caches before anything reads it.
constexpr int64_t kStreamResultBytes = 8 * 1024 * 1024;

// Elements per store that bypasses the caches: whole lines of two-byte elements where vectors are
// as long as a line. A line that is stored in pieces may leave the core in pieces.
constexpr int64_t kStreamStep = 2 * kLanes;

// Whether a result, `num_rows` rows of `size` elements at p, is written past the caches.
template <typename T>
BATON_INLINE bool streams(const T* p, int64_t num_rows, int64_t size) {
  constexpr int64_t kStepBytes = kStreamStep * sizeof(T);
  return num_rows * size * static_cast<int64_t>(sizeof(T)) >= kStreamResultBytes &&
         (reinterpret_cast<uintptr_t>(p) | size * sizeof(T)) % kStepBytes == 0;
}

#if defined(__AVX2__)
// Rounds like store. p must be aligned to the bytes of kStreamStep elements.
BATON_INLINE void stream(float* p, Vec low, Vec high) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)low);
  _mm512_stream_ps(p + kLanes, (__m512)high);
#else
  _mm256_stream_ps(p, (__m256)low);
  _mm256_stream_ps(p + kLanes, (__m256)high);
#endif
}
BATON_INLINE void stream_bits(void* p, ShortVec low, ShortVec high) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p),
                      _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1));
#else
  _mm256_stream_si256(static_cast<__m256i*>(p), _mm256_set_m128i((__m128i)high, (__m128i)low));
#endif
}
BATON_INLINE void stream(BFloat16* p, Vec low, Vec high) {
  stream_bits(p, to_bfloat16(low), to_bfloat16(high));
}
BATON_INLINE void stream(Half* p, Vec low, Vec high) {
  stream_bits(p, to_half(low), to_half(high));
}
#else
template <typename T>
BATON_INLINE void stream(T* p, Vec low, Vec high) {
  store(p, low);
  store(p + kLanes, high);
}
#endif

// Writes one cache line; target must be aligned to it.
BATON_INLINE void stream_line(char* target, const char* source) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#elif defined(__AVX2__)
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  }
#else
  __builtin_memcpy(target, source, 64);
#endif
}

// Call after the last streaming store: handing a tensor to another thread does not order them.
BATON_INLINE void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace baton::cpu::BATON_ISA
