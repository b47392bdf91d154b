// What one work item of ragged_attention covers: its query vectors, the columns they stream, and
// where those lie.
#pragma once

#include "common/ragged_attention.h"
#include "cpu/simd/copy.h"

namespace baton::cpu::BATON_ISA {

// The query vectors of one item: tokens [token, token + num_tokens) of the row, heads of one KV
// head.
struct Tile {
  int64_t row, token, num_tokens, first_head, num_heads, count;
  int64_t query_length, length;
  int64_t begin, end;  // keys to stream
};

// Keys of one block, which begins at a multiple of this: scores of a tile stay in the core's own
// cache.
constexpr int kBlockKeys = static_cast<int>(kAttentionBlockColumns);

// A block is streamed from a multiple of this on: what a window hides before it is not read.
constexpr int64_t kFirstKeys = 16;

struct Range {
  int64_t begin, end;
};

// Keys that the token at query index j of the row sees.
static inline Range visible(const RaggedAttentionParams& p, const Tile& t, int64_t j) {
  const int64_t position = t.length - t.query_length + j;
  if (position < 0) return {0, 0};
  const int64_t end = p.causal ? position + 1 : t.length;
  const int64_t begin = p.window > 0 && position + 1 > p.window ? position + 1 - p.window : 0;
  return {begin, end};
}

static inline AttentionRowPlan row_plan(const RaggedAttentionParams& p, int64_t row) {
  return plan_attention_row(p.cu_seqlens[row + 1] - p.cu_seqlens[row], p.lengths[row],
                            p.num_heads / p.sizes.num_kv_heads);
}

// The item's tokens and columns; its heads are still to be chosen.
static inline Tile make_tile(const RaggedAttentionParams& p, const AttentionItem& item,
                             const AttentionRowPlan& plan) {
  Tile tile{};
  tile.row = item.row;
  tile.query_length = p.cu_seqlens[item.row + 1] - p.cu_seqlens[item.row];
  tile.length = p.lengths[item.row];
  tile.token = item.tile * plan.tile_tokens;
  tile.num_tokens = tile.query_length - tile.token < plan.tile_tokens
                        ? tile.query_length - tile.token
                        : plan.tile_tokens;
  // The first token sees the furthest back, the last one the furthest on.
  const Range first = visible(p, tile, tile.token);
  const Range last = visible(p, tile, tile.token + tile.num_tokens - 1);
  tile.begin = first.begin / kFirstKeys * kFirstKeys;
  tile.end = last.end;
  if (plan.num_splits > 1) {
    const int64_t begin = attention_segment_begin(item.split);
    const int64_t end = attention_segment_begin(item.split + 1);
    if (tile.begin < begin) tile.begin = begin;
    if (tile.end > end) tile.end = end;
  }
  return tile;
}

// Where the keys and values of a row begin.
template <typename T>
struct Streams {
  const T* keys;
  const T* values;
};

template <typename T>
Streams<T> streams(const RaggedAttentionParams& p, const Tile& t, int64_t kv_head) {
  const int64_t slot = p.slots[t.row], column = p.starts[t.row];
  return {
      static_cast<const T*>(p.key_cache) + offset(p.key_cache_strides, 0, slot, kv_head, column),
      static_cast<const T*>(p.value_cache) +
          offset(p.value_cache_strides, 0, slot, kv_head, column),
  };
}

}  // namespace baton::cpu::BATON_ISA
