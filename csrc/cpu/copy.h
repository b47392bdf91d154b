// Copying columns between a cache and packed tokens: shared by insert_kv, extract_kv and move_kv.
#pragma once

#include <cstdint>

#include "common/cache.h"

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

}  // namespace baton::cpu::BATON_ISA
