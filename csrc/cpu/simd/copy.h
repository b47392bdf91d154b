// Copying columns between a cache and packed tokens: shared by insert_kv, extract_kv and move_kv.
#pragma once

#include <cstdint>

#include "common/cache.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/stream.h"

namespace baton::cpu::BATON_ISA {

static inline int64_t offset(const CacheStrides& s, int64_t layer, int64_t slot, int64_t head,
                             int64_t column) {
  return layer * s.layer_stride + slot * s.slot_stride + head * s.head_stride +
         column * s.column_stride;
}

static inline int64_t offset(const TokenStrides& s, int64_t layer, int64_t token, int64_t head) {
  return layer * s.layer_stride + token * s.token_stride + head * s.head_stride;
}

// Calls fn(query, begin, end) for the packed tokens [begin, end) of each query in a block of them.
template <typename Fn>
BATON_INLINE void for_each_query(const int32_t* cu_seqlens, int64_t num_queries, int64_t begin,
                                 int64_t end, const Fn& fn) {
  // The last query that begins at or before `begin` and is not empty.
  int64_t low = 0, high = num_queries;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (cu_seqlens[middle] <= begin ? low : high) = middle;
  }
  for (int64_t query = low; begin < end; ++query) {
    const int64_t stop = cu_seqlens[query + 1] < end ? cu_seqlens[query + 1] : end;
    if (begin < stop) fn(query, begin, stop);
    begin = stop;
  }
}

// Copies `rows` runs of `bytes` bytes; adjacent runs are copied as one.
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

// If a call writes more than this to each cache, the data leaves the core's caches before anything
// reads it again. Such data is written past the caches, which need not fetch its lines first.
constexpr int64_t kStreamBytes = 256 * 1024;

// Copies runs of whole cache lines. Between two rows of the source lie rows of other heads, which
// defeats the hardware prefetcher, so each row prefetches a later one.
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
}

// Like copy_rows, but past the caches if `streams` is true and the lines are whole. A range of work
// that may have streamed must end with end_stream.
static inline void copy_rows_away(bool streams, char* target, int64_t target_stride,
                                  const char* source, int64_t source_stride, int64_t rows,
                                  int64_t bytes) {
  if (streams && (reinterpret_cast<uintptr_t>(target) | target_stride | bytes) % 64 == 0) {
    return stream_rows(target, target_stride, source, source_stride, rows, bytes);
  }
  copy_rows(target, target_stride, source, source_stride, rows, bytes);
}

}  // namespace baton::cpu::BATON_ISA
