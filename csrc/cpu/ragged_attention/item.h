// A work item of ragged_attention: its query vectors, the columns they stream, and
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

// Keys per block; blocks begin at multiples of this. The scores of a tile then stay in the core's
// private cache.
constexpr int kBlockKeys = static_cast<int>(kAttentionBlockColumns);

// Within a block, streaming begins at a multiple of this: keys before it, hidden by a window, are
// not read.
constexpr int64_t kFirstKeys = 16;

struct Range {
  int64_t begin, end;
};

// The keys that the token at query index j of the row sees.
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

// The item's tokens and columns; its heads are chosen later.
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
  // The first token sees furthest back, the last one furthest forward.
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

// Consecutive keys, or values, one stride apart.
template <typename T>
struct Run {
  const T* data;
  int64_t count;
};

// The keys, or the values, of a row and KV head.
template <typename T>
class Stream {
 public:
  Stream() = default;
  Stream(const RaggedAttentionParams& p, const void* cache, const CacheStrides& strides,
         int64_t row, int64_t kv_head)
      : stride_(strides.column_stride) {
    int64_t slot = 0, column = p.starts[row];
    if (p.block_table) {
      pages_ = p.block_table + row * p.block_table_stride;
      page_stride_ = strides.slot_stride;
      page_size_ = p.sizes.capacity;
      // A page of one column has no second column, so the stride is the distance between pages.
      if (page_size_ == 1) stride_ = page_stride_;
      start_ = column;
      column = 0;
    } else {
      slot = p.slots[row];
    }
    data_ = static_cast<const T*>(cache) + offset(strides, 0, slot, kv_head, column);
  }

  int64_t stride() const { return stride_; }

  // The longest run of keys one stride apart, from this key of the row on, up to `wanted` keys. In
  // a slot that is all of them; with pages, the rest of the page and of pages that follow it in
  // memory.
  Run<T> run(int64_t key, int64_t wanted) const {
    if (!pages_) return {data_ + key * stride_, wanted};
    const int64_t column = start_ + key, index = column / page_size_;
    return run_in_pages(index, column - index * page_size_, wanted);
  }

  // Calls fn(row, number of rows) for the runs of `count` keys.
  template <typename Fn>
  BATON_INLINE void for_each_run(int64_t key, int64_t count, const Fn& fn) const {
    if (pages_) return for_each_page(key, count, fn);
    fn(data_ + key * stride_, count);
  }

  // With pages: calls fn(row, number of rows) for each part of the `count` keys that lies within
  // one page.
  template <typename Fn>
  BATON_INLINE void for_each_page(int64_t key, int64_t count, const Fn& fn) const {
    const int64_t first = (start_ + key) / page_size_;
    int64_t column = start_ + key - first * page_size_;
    for (const int32_t* page = pages_ + first; count > 0; ++page, column = 0) {
      const int64_t rest = page_size_ - column, here = count < rest ? count : rest;
      fn(data_ + *page * page_stride_ + column * stride_, here);
      count -= here;
    }
  }

 private:
  BATON_INLINE Run<T> run_in_pages(int64_t index, int64_t column, int64_t wanted) const {
    const int32_t* page = pages_ + index;
    const T* data = data_ + *page * page_stride_ + column * stride_;
    int64_t count = page_size_ - column;
    if (page_stride_ == page_size_ * stride_) {
      for (; count < wanted && page[1] == page[0] + 1; ++page) count += page_size_;
    }
    return {data, count < wanted ? count : wanted};
  }

  const T* data_ = nullptr;         // the row's first key; with pages, column 0 of page 0
  int64_t stride_ = 0;              // elements from one column to the next
  const int32_t* pages_ = nullptr;  // the row's list of pages; null in a slot
  int64_t page_stride_ = 0;         // elements from one page to the next
  int64_t page_size_ = 0;           // columns of a page
  int64_t start_ = 0;               // with pages: the row's first column
};

template <typename T>
struct Streams {
  Streams() = default;
  Streams(const RaggedAttentionParams& p, int64_t row, int64_t kv_head)
      : keys(p, p.key_cache, p.key_cache_strides, row, kv_head),
        values(p, p.value_cache, p.value_cache_strides, row, kv_head) {
    if constexpr (sizeof(T) != 1) return;
    key_scales = {p, p.scales.key, p.scales.key_strides, row, kv_head};
    value_scales = {p, p.scales.value, p.scales.value_strides, row, kv_head};
  }

  Stream<T> keys, values;
  Stream<float> key_scales, value_scales;  // for eight-bit elements
};

}  // namespace baton::cpu::BATON_ISA
