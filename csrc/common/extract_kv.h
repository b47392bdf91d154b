// extract_kv: key[l, cu_seqlens[i] + t, h] = key_cache[l, slots[i], h, starts[i] + t], value
// likewise.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"
#include "common/token_blocks.h"

namespace baton {

struct ExtractKvParams {
  const void* key_cache;      // [num_layers, num_slots, num_kv_heads, capacity, head_dim]
  const void* value_cache;    // as key_cache
  void* key;                  // [num_layers, total_tokens, num_kv_heads, head_dim]
  void* value;                // as key
  const int32_t* cu_seqlens;  // [num_queries + 1]
  const int32_t* slots;       // [num_queries]
  const int32_t* starts;      // [num_queries]
  int64_t num_queries;
  int64_t total_tokens;
  CacheSizes sizes;
  CacheStrides key_cache_strides, value_cache_strides;
  TokenStrides key_strides, value_strides;
  Dtype dtype;                          // of key and value
  Dtype cache_dtype = Dtype::kFloat32;  // dtype, or an eight-bit type
  KvScales scales = {};
  bool reuses_memory = false;  // key and value lie in the caller's memory, not in fresh pages
};

// One work item is one (layer, block of packed tokens).
static inline int64_t extract_kv_work(const ExtractKvParams& p) {
  return p.sizes.num_layers * num_token_blocks(p.sizes, p.dtype, p.total_tokens);
}

// Bytes of keys and values that a call copies.
static inline int64_t extract_kv_bytes(const ExtractKvParams& p) {
  return p.sizes.num_layers * p.total_tokens * token_bytes(p.sizes, p.dtype);
}

}  // namespace baton
