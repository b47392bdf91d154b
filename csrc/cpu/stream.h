// Stores that go past the caches: for what is read much later, if at all by this core. A store
// through the caches fetches its line first, which such a line is not worth.
#pragma once

#include <cstdint>

#include "cpu/simd.h"

namespace baton::cpu::BATON_ISA {

// A result of so many bytes has left the caches before anybody reads it.
constexpr int64_t kStreamResultBytes = 8 * 1024 * 1024;

// Whether a result, rows of `size` elements from p on, is written past the caches.
template <typename T>
BATON_INLINE bool streams(const T* p, int64_t num_rows, int64_t size) {
  constexpr int64_t kVecBytes = kLanes * sizeof(T);
  return num_rows * size * static_cast<int64_t>(sizeof(T)) >= kStreamResultBytes &&
         (reinterpret_cast<uintptr_t>(p) | size * sizeof(T)) % kVecBytes == 0;
}

#if defined(__AVX2__)
// Rounds like store. p is aligned to the bytes of kLanes elements.
BATON_INLINE void stream(float* p, Vec x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#else
  _mm256_stream_ps(p, (__m256)x);
#endif
}
BATON_INLINE void stream_bits(void* p, ShortVec x) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)x);
#else
  _mm_stream_si128(static_cast<__m128i*>(p), (__m128i)x);
#endif
}
BATON_INLINE void stream(BFloat16* p, Vec x) { stream_bits(p, to_bfloat16(x)); }
BATON_INLINE void stream(Half* p, Vec x) { stream_bits(p, to_half(x)); }
#else
template <typename T>
BATON_INLINE void stream(T* p, Vec x) {
  store(p, x);
}
#endif

// One cache line; target is aligned to it.
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

// Streaming stores are not ordered by what hands the tensor to another thread: after the last one.
BATON_INLINE void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace baton::cpu::BATON_ISA
