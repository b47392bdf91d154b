// insert_kv: key_cache[l, slots[i], h, starts[i] + t] = key[l, cu_seqlens[i] + t, h], value
// likewise.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"
#include "common/token_blocks.h"

namespace baton {

struct InsertKvParams {
  const void* key;            // [num_layers, total_tokens, num_kv_heads, head_dim]
  const void* value;          // as key
  void* key_cache;            // [num_layers, num_slots, num_kv_heads, capacity, head_dim]
  void* value_cache;          // as key_cache
  const int32_t* cu_seqlens;  // [num_queries + 1]
  const int32_t* slots;       // [num_queries]
  const int32_t* starts;      // [num_queries]
  int64_t num_queries;
  int64_t total_tokens;
  CacheSizes sizes;
  TokenStrides key_strides, value_strides;
  CacheStrides key_cache_strides, value_cache_strides;
  Dtype dtype;
  bool zero_padding;                    // also clear columns [0, starts[i])
  Dtype cache_dtype = Dtype::kFloat32;  // dtype, or an eight-bit type
  KvScales scales = {};
};

// One work item is one (layer, block of packed tokens). With zero_padding there is also one item
// per (layer, query) that clears padding; those come first.
static inline int64_t insert_kv_clearing_work(const InsertKvParams& p) {
  return p.zero_padding ? p.sizes.num_layers * p.num_queries : 0;
}
static inline int64_t insert_kv_work(const InsertKvParams& p) {
  return insert_kv_clearing_work(p) +
         p.sizes.num_layers * num_token_blocks(p.sizes, p.dtype, p.total_tokens);
}

// Bytes of keys and values that a call copies.
static inline int64_t insert_kv_bytes(const InsertKvParams& p) {
  return p.sizes.num_layers * p.total_tokens * token_bytes(p.sizes, p.dtype);
}

}  // namespace baton
