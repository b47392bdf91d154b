// How every op sees a KV cache: a base pointer, and strides in elements.
#pragma once

#include <cstdint>

namespace baton {

// [num_layers, num_slots, num_kv_heads, capacity, head_dim], last dimension contiguous.
// Strides are int64 because a cache may hold more than 2^31 elements.
struct CacheStrides {
  int64_t layer_stride = 0;
  int64_t slot_stride = 0;
  int64_t head_stride = 0;
  int64_t column_stride = 0;

  bool operator==(const CacheStrides&) const = default;
};

// [num_layers, total_tokens, num_heads, head_dim], last dimension contiguous.
struct TokenStrides {
  int64_t layer_stride = 0;
  int64_t token_stride = 0;
  int64_t head_stride = 0;

  bool operator==(const TokenStrides&) const = default;
};

struct CacheSizes {
  int64_t num_layers = 1;
  int64_t num_slots = 0;
  int64_t num_kv_heads = 0;
  int64_t capacity = 0;
  int64_t head_dim = 0;
};

}  // namespace baton
