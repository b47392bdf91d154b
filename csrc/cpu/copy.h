// Copying columns between a cache and packed tokens: shared by insert_kv, extract_kv and move_kv.
#pragma once

#include <cstdint>

#include "common/cache.h"
#include "cpu/simd.h"
#include "cpu/stream.h"

namespace baton::cpu::BATON_ISA {

// Which (layer, query, head) a work item is.
struct CopyItem {
  int64_t layer, query, head;
};

static inline CopyItem copy_item(int64_t index, int64_t num_queries, int64_t num_heads) {
  return {index / (num_queries * num_heads), index / num_heads % num_queries, index % num_heads};
}

static inline int64_t offset(const CacheStrides& s, int64_t layer, int64_t slot, int64_t head,
                             int64_t column) {
  return layer * s.layer_stride + slot * s.slot_stride + head * s.head_stride +
         column * s.column_stride;
}

static inline int64_t offset(const TokenStrides& s, int64_t layer, int64_t token, int64_t head) {
  return layer * s.layer_stride + token * s.token_stride + head * s.head_stride;
}

// Copies `rows` runs of `bytes` bytes; adjacent runs become one.
static inline void copy_rows(char* target, int64_t target_stride, const char* source,
                             int64_t source_stride, int64_t rows, int64_t bytes) {
  if (target_stride == bytes && source_stride == bytes) {
    __builtin_memcpy(target, source, rows * bytes);
    return;
  }
  for (int64_t i = 0; i < rows; ++i) {
    __builtin_memcpy(target + i * target_stride, source + i * source_stride, bytes);
  }
}

// What is longer than this has left the core's caches before it is read again: written past them,
// it need not be fetched first.
constexpr int64_t kStreamBytes = 32 * 1024;

#if defined(__AVX2__)
BATON_INLINE void stream_line(char* target, const char* source) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
#else
  for (int i = 0; i < 64; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
  }
#endif
}

// Runs of whole cache lines. Rows of another head lie between two of the source's, so the hardware
// does not foresee them: each row asks for one that comes later.
static inline void stream_rows(char* target, int64_t target_stride, const char* source,
                               int64_t source_stride, int64_t rows, int64_t bytes) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t b = 0; b < bytes; b += 64) {
      __builtin_prefetch(source + 16 * source_stride + b, 0, 2);
      stream_line(target + b, source + b);
    }
    target += target_stride;
    source += source_stride;
  }
  end_stream();
}
#endif

// copy_rows into memory that is there already and is read much later, if at all by this core. Pages
// that the kernel has just cleared are better written through the caches they lie in.
static inline void copy_rows_away(char* target, int64_t target_stride, const char* source,
                                  int64_t source_stride, int64_t rows, int64_t bytes) {
#if defined(__AVX2__)
  if (rows * bytes >= kStreamBytes &&
      (reinterpret_cast<uintptr_t>(target) | target_stride | bytes) % 64 == 0) {
    return stream_rows(target, target_stride, source, source_stride, rows, bytes);
  }
#endif
  copy_rows(target, target_stride, source, source_stride, rows, bytes);
}

}  // namespace baton::cpu::BATON_ISA
