// Places of a row's keys: in its slot, or with a block table in pages.
#pragma once

#include "cuda/ragged_attention/rows.h"

namespace baton::cuda {

// A key's page, and its column there.
struct PagePlace {
  uint32_t page;
  int32_t column;
};

// Looks up a key's place in the block table. A page that does not exist is taken for the last one:
// nothing outside the caches is read, with any table.
__device__ __forceinline__ PagePlace place_of(const AttentionArgs& a, const AttentionRow& row,
                                              int32_t key) {
  const auto column = static_cast<uint32_t>(row.start + key);
  const auto index = static_cast<uint32_t>(uint64_t{column} * a.page_factor >> a.page_shift);
  const int32_t* table = a.p.block_table + row.index * a.p.block_table_stride;
  return {min(load_4(table + index), static_cast<uint32_t>(a.num_slots - 1)),
          static_cast<int32_t>(column - index * static_cast<uint32_t>(a.page))};
}

// The address from which offsets of a row's keys, or values, count: that of the first key, or with
// a block table that of the first column of page 0.
template <typename T>
__device__ __forceinline__ const T* row_base(const AttentionRow& row, bool paged, int32_t kv_head,
                                             const void* cache, const CacheStrides& s) {
  const T* base = static_cast<const T*>(cache) + kv_head * s.head_stride;
  return paged ? base : base + row.slot * s.slot_stride + row.start * s.column_stride;
}

// The offset of a key from there, in elements.
__device__ __forceinline__ int64_t offset_of(const AttentionArgs& a, const AttentionRow& row,
                                             int32_t key, const CacheStrides& s) {
  if (!a.p.block_table) return key * s.column_stride;
  const PagePlace place = place_of(a, row, key);
  return place.page * s.slot_stride + place.column * s.column_stride;
}

}  // namespace baton::cuda
