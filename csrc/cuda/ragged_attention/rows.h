// Shared by the kernels of ragged_attention: how rows are cut into items, and which keys a vector
// sees.
//
// A query vector is one head of one query token; the vectors of a row and KV head are numbered
// token * group + head. An item is one (row, tile of vectors, split of the keys) of a KV head. A
// row that decodes one token is split by its own length. A row of several tokens is split at the
// segments of its keys (common/attention_segments.h), or has all of them merged in the same order
// and with the same arithmetic by one block: which of the two changes no bits, so that those of a
// token do not depend on how its row was cut into calls.
//
// Scores live in base 2: x = score / log_unit with log_unit close to ln 2, exactly what rounding
// the factor of the scores to float makes of it, so that 2^x is exp(score) and lse loses nothing.
#pragma once

#include "common/ragged_attention.h"
#include "cuda/device/chunk.h"

namespace baton::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;

constexpr int kStepKeys = 16;  // of a warp that decodes; the depth of its second product
// Splits begin at multiples of this.
constexpr int32_t kSplitUnit = kStepKeys * kAttentionWarps;
static_assert(attention_segment_keys(0) % kSplitUnit == 0);

// A row that decodes one token has splits of 256 keys, so that a single row of 2,048 has 3 MB in
// flight in 64 blocks (8 KV heads), where 132 multiprocessors need 2.4; splits of 512 keys if there
// are enough of them; and a maximum, which bounds the partial results by the size of the output.
constexpr int32_t kShortSplitKeys = 256, kShortSplits = 16, kSplitKeys = 512, kMaxSplits = 64;

// A row of several tokens is split as long as its tiles of all KV heads leave multiprocessors of a
// large device idle, which is also what bounds its partial results.
constexpr int64_t kSplitTiles = 64;
// The same bound over all rows of a call.
constexpr int64_t kSplitTilesOfAll = 128;

struct AttentionArgs {
  RaggedAttentionParams p;  // strides in elements
  int32_t group;            // query heads per KV head
  int32_t decode_shift;     // 2^decode_shift is at least `group`
  int32_t max_splits;       // bound of all rows
  int32_t decode_items;     // of a KV head, if every row decodes and has all splits
  // Vectors up to which a row of several tokens is split; 0: none is.
  int32_t max_split_vectors;
  int32_t partial_vectors;                       // the number of places for partial results
  int32_t key_column_bytes, value_column_bytes;  // tensor core kernels: 32 bits are enough
  // Copies of p's 64-bit fields, clamped to INT32_MAX; a window of INT32_MAX means no window.
  int32_t num_slots, capacity, total_queries, max_query_length, max_length, window;
  // With a block table num_slots is the number of pages, `capacity` the columns that a row can
  // have, and `page` those of a page; column c lies in page c * page_factor >> page_shift of its
  // row.
  int32_t page, page_shift;
  uint32_t page_factor;
  // The keys of a warp's step that begins at a multiple of 16 columns are in one page, as far from
  // those of the step before as their values.
  bool pages_of_steps;
  bool plain_scores;             // neither softcap nor ALiBi
  bool has_decode;               // rows of one token are the decode kernel's
  float* partial_sums;           // [vectors, num_kv_heads, max_splits, head_dim]
  float* partial_stats;          // [vectors, num_kv_heads, max_splits, 2]: maximum, sum
  float* totals;                 // of the segments that a block of the prefill kernel has seen
  float score_scale;             // base 2
  float tanh_scale, tanh_bound;  // softcap: x = tanh_bound * tanh(tanh_scale * q.k)
  float slope_scale;             // 1 / log_unit
  double log_unit, inverse_unit;
};

// Splits of a row that decodes one token, some of which may be empty.
__host__ __device__ inline int32_t decode_splits(int32_t length) {
  if (length <= kShortSplits * kSplitKeys) {
    const int32_t splits = (length - 1) / kShortSplitKeys + 1;
    return splits < kShortSplits ? splits : kShortSplits;
  }
  const int32_t splits = (length - 1) / kSplitKeys + 1;
  return splits < kMaxSplits ? splits : kMaxSplits;
}
__host__ __device__ inline int32_t decode_split_keys(int32_t length, int32_t splits) {
  const int32_t keys = splits == 1 ? length : (length - 1) / splits + 1;
  return (keys + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
}

// The number of segments that `length` keys begin.
__host__ __device__ inline int32_t num_segments(int32_t length) {
  return length > 0 ? static_cast<int32_t>(attention_segment_of(length - 1)) + 1 : 1;
}
// The first key of a segment, which may be behind every row.
__host__ __device__ inline int32_t segment_begin(int32_t segment) {
  const int64_t begin = attention_segment_begin(segment);
  return begin < INT32_MAX ? static_cast<int32_t>(begin) : INT32_MAX;
}

struct KeyRange {
  int32_t begin, end;
};

struct AttentionRow {
  int32_t index, first_token, query_length, length, vectors;
  int32_t slot, start;

  // False for a row that has nothing to do or lies outside of what the host promised.
  __device__ __forceinline__ bool load(const AttentionArgs& a, int32_t row) {
    const RaggedAttentionParams& p = a.p;
    index = row;
    const auto at = [&](const int32_t* of_rows) {
      return static_cast<int32_t>(load_4(of_rows + row));
    };
    first_token = at(p.cu_seqlens);
    slot = p.block_table ? 0 : at(p.slots);
    start = at(p.starts);
    length = at(p.lengths);
    query_length = static_cast<int32_t>(unsigned(at(p.cu_seqlens + 1)) - unsigned(first_token));
    vectors = static_cast<int32_t>(unsigned(query_length) * unsigned(a.group));
    // As unsigned numbers, negative ones are too large. The differences are not negative: the host
    // bounds query_length by total_queries and length by capacity.
    return (unsigned(query_length) - 1 < unsigned(a.max_query_length)) &&
           (unsigned(first_token) <= unsigned(a.total_queries) - unsigned(query_length)) &&
           (unsigned(slot) < unsigned(a.num_slots)) &&
           (unsigned(length) <= unsigned(a.max_length)) &&
           (unsigned(start) <= unsigned(a.capacity) - unsigned(length));
  }
  // The position of a query token of the row.
  __device__ __forceinline__ int32_t position(int32_t token) const {
    return length - query_length + token;
  }
  __device__ __forceinline__ KeyRange visible(const AttentionArgs& a, int32_t token) const {
    const int32_t seen = max(position(token) + 1, 0);  // keys up to its own
    return {max(seen - a.window, 0), a.p.causal || seen == 0 ? seen : length};
  }
  // The number of items of a tile of vectors.
  __device__ __forceinline__ int32_t splits(const AttentionArgs& a) const {
    if (query_length == 1) return decode_splits(length);
    return vectors <= a.max_split_vectors ? num_segments(length) : 1;
  }
  // Keys of one of several splits. The end of the last one may be behind the row.
  __device__ __forceinline__ KeyRange split_keys(int32_t split, int32_t splits) const {
    if (query_length > 1) return {segment_begin(split), segment_begin(split + 1)};
    const unsigned keys = decode_split_keys(length, splits);
    // The end of 64 of them stays below 2^31 + 2^12.
    return {static_cast<int32_t>(split * keys),
            static_cast<int32_t>(min((split + 1) * keys, unsigned(INT32_MAX)))};
  }
};

// The keys that some vector of a tile sees in a split, and those that all see.
struct TileKeys {
  int32_t begin, end, full_begin, full_end;

  __device__ __forceinline__ TileKeys(const AttentionArgs& a, const AttentionRow& row,
                                      int32_t first_token, int32_t last_token, int32_t split,
                                      int32_t splits) {
    // The first token sees furthest back, the last one furthest forward.
    const KeyRange first = row.visible(a, first_token), last = row.visible(a, last_token);
    begin = first.begin;
    end = last.end;
    full_begin = last.begin;
    full_end = first.end;
    if (splits > 1) {
      const KeyRange keys = row.split_keys(split, splits);
      begin = max(begin, keys.begin);
      end = min(end, keys.end);
    }
    full_end = min(full_end, end);
  }
};

struct AttentionItem {
  AttentionRow row;
  int32_t tile, split, splits;
};

// A block's item of each round, for any number of blocks along x. Rows begin with their
// longest items: every second round goes backwards, so that no block has the longest of each.
__device__ __forceinline__ int32_t item_of(int32_t round) {
  int32_t blocks = gridDim.x, block = blockIdx.x;
  // Neither is kept in a register from one item to the next.
  hide(blocks);
  hide(block);
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

// The row of the item `item` of a KV head and its number in the row, in tiles of `tile_vectors` of
// the rows of one token, or of the others, or of both. Every warp looks for itself, 32 rows at a
// time; false past the last item. Count is wide enough for the items of any 32 rows, whichever
// these say.
template <typename Count>
__device__ __forceinline__ bool find_row(const AttentionArgs& a, int32_t item, int32_t tile_vectors,
                                         bool of_one, bool of_many, int32_t& index, int32_t& rest) {
  const int32_t lane = threadIdx.x % 32;
  auto num_rows = static_cast<int32_t>(a.p.num_rows);
  hide(num_rows);
  for (int32_t first = 0; first < num_rows; first += 32) {
    AttentionRow row{};
    Count items = 0;
    if (first + lane < num_rows && row.load(a, first + lane) &&
        (row.query_length == 1 ? of_one : of_many)) {
      items = Count{(row.vectors - 1) / tile_vectors + 1} * row.splits(a);
    }
    Count up_to_here = items;
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const Count before = __shfl_up_sync(~0u, up_to_here, offset);
      if (lane >= offset) up_to_here += before;
    }
    const unsigned reached = __ballot_sync(~0u, up_to_here > item);
    if (reached) {
      const int32_t owner = __ffs(static_cast<int>(reached)) - 1;
      rest = static_cast<int32_t>(item - __shfl_sync(~0u, up_to_here - items, owner));
      index = first + owner;
      return true;
    }
    item -= static_cast<int32_t>(__shfl_sync(~0u, up_to_here, 31));
  }
  return false;
}

// Finds the row, tile and split of an item; false past the last item.
__device__ __forceinline__ bool find_item(const AttentionArgs& a, int32_t item,
                                          int32_t tile_vectors, bool of_one, AttentionItem& found) {
  int32_t index, rest;
  if (!find_row<int64_t>(a, item, tile_vectors, of_one, true, index, rest)) return false;
  // All lanes read the row again; otherwise one lane would have to send them each number.
  found.row.load(a, index);
  found.splits = found.row.splits(a);
  found.tile = rest / found.splits;
  found.split = rest - found.tile * found.splits;
  return true;
}

// The index of a vector's partial result of one split. If rows of several tokens may be split,
// every query token has places; else each row has the places of one token.
__device__ __forceinline__ int64_t partial_index(const AttentionArgs& a, const AttentionRow& row,
                                                 int32_t vector, int32_t kv_head, int32_t split) {
  const int64_t place = int64_t{a.max_split_vectors > 0 ? row.first_token : row.index} * a.group;
  return ((place + vector) * a.p.sizes.num_kv_heads + kv_head) * a.max_splits + split;
}

// The index of a vector in out and lse.
__device__ __forceinline__ int64_t result_index(const AttentionArgs& a, const AttentionRow& row,
                                                int32_t token, int32_t head) {
  // A result has fewer than 2^31 tokens and heads each.
  return int64_t{row.first_token + token} * static_cast<int32_t>(a.p.num_heads) + head;
}

}  // namespace baton::cuda
