// move_kv: columns [source_start, source_start + length) of one slot become columns
// [target_start, ...) of another or the same slot, as if the source were read whole before the
// target is written.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"
#include "common/token_blocks.h"

namespace baton {

struct MoveKvParams {
  void* key_cache;               // [num_layers, num_slots, num_kv_heads, capacity, head_dim]
  void* value_cache;             // as key_cache
  const int32_t* source_slots;   // [num_moves]
  const int32_t* source_starts;  // [num_moves]
  const int32_t* target_slots;   // [num_moves]
  const int32_t* target_starts;  // [num_moves]
  const int32_t* lengths;        // [num_moves]
  int64_t num_moves;
  CacheSizes sizes;
  CacheStrides key_cache_strides, value_cache_strides;
  Dtype dtype;
  KvScales scales = {};
};

// One work item is one (layer, move, KV head).
static inline int64_t move_kv_work(const MoveKvParams& p) {
  return p.sizes.num_layers * p.num_moves * p.sizes.num_kv_heads;
}

// Bytes of keys and values that a call moves. Reads the lengths: on the CPU only.
static inline int64_t move_kv_bytes(const MoveKvParams& p) {
  int64_t columns = 0;
  for (int64_t i = 0; i < p.num_moves; ++i) columns += p.lengths[i];
  return p.sizes.num_layers * columns * token_bytes(p.sizes, p.dtype);
}

}  // namespace baton
