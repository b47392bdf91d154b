// append_kv: rotate one token per row (optional), write its key and value into its column.
//   x1 = x[: d / 2], x2 = x[d / 2 :];  rotated = [x1 cos - x2 sin, x2 cos + x1 sin]
#pragma once

#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"

namespace baton {

struct AppendKvParams {
  const void* key;         // [num_rows, num_kv_heads, head_dim]
  const void* value;       // as key
  const void* query;       // [num_rows, num_heads, head_dim] or null
  void* rotated_query;     // [num_rows, num_heads, head_dim], contiguous; null without query
  void* key_cache;         // [num_slots, num_kv_heads, capacity, head_dim]
  void* value_cache;       // as key_cache
  const int32_t* slots;    // [num_rows]
  const int32_t* columns;  // [num_rows]
  const void* cos;         // [num_rows, rotary_dim] or null: nothing is rotated
  const void* sin;         // as cos
  int64_t num_rows;
  int64_t num_heads;   // of query; 0 without query
  int64_t rotary_dim;  // head_dim / 2 or head_dim
  int64_t cos_row_stride, sin_row_stride;
  CacheSizes sizes;
  TokenStrides key_strides, value_strides, query_strides;
  CacheStrides key_cache_strides, value_cache_strides;
  Dtype dtype;
  Dtype rotary_dtype;                   // of cos and sin: float32 or dtype
  Dtype cache_dtype = Dtype::kFloat32;  // dtype, or an eight-bit type
  KvScales scales = {};
};

// One work item is one row.
static inline int64_t append_kv_work(const AppendKvParams& p) { return p.num_rows; }

}  // namespace baton
