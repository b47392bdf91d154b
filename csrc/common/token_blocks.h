// How the CPU cuts packed tokens into work items: by tokens with all their heads, so that the
// packed side of an item is one run of memory and no two threads write to one page.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"

namespace baton {

// Bytes of keys (or of values) per item: enough to hide the cost of taking an item, few enough to
// share one query among threads.
constexpr int64_t kTokenBlockBytes = 64 * 1024;

// Bytes of the keys (or of the values) of one token in one layer.
static inline int64_t token_bytes(const CacheSizes& sizes, Dtype dtype) {
  return sizes.num_kv_heads * sizes.head_dim * size_of(dtype);
}

static inline int64_t tokens_per_block(const CacheSizes& sizes, Dtype dtype) {
  const int64_t bytes = token_bytes(sizes, dtype);
  return bytes < kTokenBlockBytes ? kTokenBlockBytes / bytes : 1;
}

static inline int64_t num_token_blocks(const CacheSizes& sizes, Dtype dtype, int64_t total_tokens) {
  const int64_t tokens = tokens_per_block(sizes, dtype);
  return (total_tokens + tokens - 1) / tokens;
}

}  // namespace baton
