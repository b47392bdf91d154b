// ragged_attention: softmax(scale q k^T) v of every query token over the valid columns of its row.
//
// On the CPU a row's work is cut into query tiles and, for a row with a single tile, into the
// segments of its keys (attention_segments.h), whose partial results are merged in order. A row
// with several tiles merges them as it goes, in the same order and with the same arithmetic: a
// token's bits depend on its own query vector and on the keys that it sees, not on the cut.
#pragma once

#include "common/attention_segments.h"
#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"

namespace baton {

// CUDA's kernels for rows of several tokens: chosen by the device and the call, warps of 16 query
// vectors, warps of 32 (compute capability 8 and 9, with the bits of those of 16), or warpgroups
// (compute capability 9.0, with other bits). A call that has no such kernel gets kMma's.
enum class PrefillKernel : int32_t { kAutomatic, kMma, kMma32, kWgmma };

struct RaggedAttentionParams {
  const void* query;          // [total_queries, num_heads, head_dim]
  const void* key_cache;      // [num_slots, num_kv_heads, capacity, head_dim]; with a block
                              // table num_slots pages of capacity columns
  const void* value_cache;    // as key_cache
  void* out;                  // [total_queries, num_heads, head_dim], contiguous
  float* lse;                 // [total_queries, num_heads], contiguous, or null
  const int32_t* cu_seqlens;  // [num_rows + 1]
  const int32_t* slots;       // [num_rows]; null with a block table
  const int32_t* starts;      // [num_rows]
  const int32_t* lengths;     // [num_rows]
  const float* alibi_slopes;  // [num_heads] or null
  const float* sinks;         // [num_heads] or null
  // [num_rows, max_pages] or null: column c of a row lies in page c / capacity of its list.
  const int32_t* block_table;
  int64_t block_table_stride;  // elements from one row to the next
  int64_t max_pages;
  int64_t num_rows, num_heads;
  CacheSizes sizes;
  TokenStrides query_strides;
  CacheStrides key_cache_strides, value_cache_strides;
  float scale, softcap;
  int64_t window;  // 0: no window
  bool causal;
  Dtype dtype;  // of query and out
  // The caches' dtype, and their scales where it is an eight-bit type.
  Dtype cache_dtype = Dtype::kFloat32;
  KvScales scales = {};
  // Only CUDA needs these: its host does not see the rows.
  int64_t total_queries;
  int64_t max_query_length, max_length;  // bounds of all rows
  PrefillKernel prefill = PrefillKernel::kAutomatic;
  float* workspace;  // see cuda/kernels.h; null when it is empty
};

// Columns that a row can have.
static inline int64_t attention_columns(const RaggedAttentionParams& p) {
  return p.block_table ? p.max_pages * p.sizes.capacity : p.sizes.capacity;
}

// Query vectors (tokens x heads of one KV head) that one pass over keys and values serves.
constexpr int64_t kAttentionTileQueries = 64;
// Segments begin at a multiple of this, so that only a row's last block can be a partial one.
constexpr int64_t kAttentionBlockColumns = 64;

// One (row, KV head, query tile, split), or a split whose keys several rows share: the query
// vectors of these rows, at most kAttentionTileQueries together, then read it in one pass.
struct AttentionItem {
  int32_t row, kv_head, tile, split;
  int32_t first_sharer = 0, num_sharers = 0;  // in AttentionWork::sharers; 0: no sharing
};

struct AttentionRowPlan {
  int64_t tile_tokens;  // query tokens of one tile
  int64_t num_tiles;
  int64_t num_splits;  // 1: every tile streams all of its segments; else one segment per split
};

static inline AttentionRowPlan plan_attention_row(int64_t query_length, int64_t length,
                                                  int64_t group) {
  AttentionRowPlan plan{};
  plan.tile_tokens = group >= kAttentionTileQueries ? 1 : kAttentionTileQueries / group;
  plan.num_tiles = (query_length + plan.tile_tokens - 1) / plan.tile_tokens;
  plan.num_splits = 1;
  if (plan.num_tiles == 1 && length > 0) plan.num_splits = attention_segment_of(length - 1) + 1;
  return plan;
}

// The work of one call: the items, and where the partial results of split rows go.
struct AttentionWork {
  const AttentionItem* items;
  int64_t num_items;
  const int64_t*
      partial_offsets;     // [num_rows]: first float of the row's partials, -1 without splits
  float* partials;         // per (token, head, split): sums, then maximum and sum
  const int32_t* sharers;  // rows
};

// Floats that the CPU keeps for the sums of one query vector: head_dim, rounded up. Within every 32
// the kernel chooses the order.
static inline int64_t attention_sums(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
static inline int64_t attention_partial_size(int64_t head_dim) {
  return attention_sums(head_dim) + 2;
}

}  // namespace baton
