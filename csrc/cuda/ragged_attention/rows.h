// What the kernels of ragged_attention share: the cutting of rows into items, who sees which keys,
// and how sums become a result.
//
// A query vector is one head of one query token; the vectors of a row and KV head are numbered
// token * group + head. An item is one (row, KV head, tile of vectors, split of the keys). Tiles
// and splits of a row follow from its own query length and length, so that no other row changes its
// bits.
//
// Scores live in base 2: x = score / log_unit with log_unit close to ln 2, exactly what rounding
// the factor of the scores to float makes of it, so that 2^x is exp(score) and lse loses nothing.
#pragma once

#include "common/ragged_attention.h"
#include "cuda/device/chunk.h"

namespace baton::cuda {

constexpr int kAttentionWarps = 4;
constexpr int kAttentionThreads = 32 * kAttentionWarps;

// Up to so many vectors a row may be split: more of them fill the device by their number, and their
// partial results would outweigh the keys.
constexpr int32_t kSplitVectors = static_cast<int32_t>(kAttentionTileQueries);
// Splits begin at multiples of this: four warps with 16 keys each.
constexpr int32_t kSplitUnit = 16 * kAttentionWarps;

struct AttentionArgs {
  RaggedAttentionParams p;  // strides in elements
  int32_t group;            // query heads per KV head
  int32_t group_magic;      // (x * group_magic) >> 16 is x / group for x < 64
  int32_t decode_vectors;   // rows up to here belong to the decode kernel
  int32_t decode_shift;     // 2^decode_shift is at least any such row's vectors
  int32_t max_splits;       // bound of all rows
  int32_t max_split_vectors;
  int32_t key_column_bytes, value_column_bytes;  // tensor core kernels: 32 bits are enough
  // What p says in 64 bits, for rows: at most INT32_MAX. No window is one of INT32_MAX.
  int32_t num_slots, capacity, total_queries, max_query_length, max_length, window;
  bool plain_scores;             // neither softcap nor ALiBi
  bool partials_by_token;        // how partial results are numbered, see partial_index()
  float* partial_sums;           // [vectors, num_kv_heads, max_splits, head_dim]
  float* partial_stats;          // [vectors, num_kv_heads, max_splits, 2]: maximum, sum
  float score_scale;             // base 2
  float tanh_scale, tanh_bound;  // softcap: x = tanh_bound * tanh(tanh_scale * q.k)
  float slope_scale;             // 1 / log_unit
  double log_unit, inverse_unit;
};

__host__ __device__ inline int32_t split_columns(int32_t length, int32_t num_splits) {
  const int32_t columns = num_splits == 1 ? length : (length - 1) / num_splits + 1;
  return (columns + kSplitUnit - 1) / kSplitUnit * kSplitUnit;
}

// Splits of a row with so many vectors per KV head, some of which may be empty.
__host__ __device__ inline int32_t num_splits(int32_t vectors, int32_t length) {
  constexpr int32_t kColumns = kAttentionSplitColumns, kMost = kAttentionMaxSplits;
  if (vectors > kSplitVectors || length <= kColumns) return 1;
  const int32_t splits = (length - 1) / kColumns + 1;
  return splits < kMost ? splits : kMost;
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
    slot = at(p.slots);
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
  // Of a query token of the row.
  __device__ __forceinline__ int32_t position(int32_t token) const {
    return length - query_length + token;
  }
  __device__ __forceinline__ KeyRange visible(const AttentionArgs& a, int32_t token) const {
    const int32_t seen = max(position(token) + 1, 0);  // keys up to its own
    return {max(seen - a.window, 0), a.p.causal || seen == 0 ? seen : length};
  }
};

// The keys that some vector of [first, first + count) sees in a split, and those that all see.
struct TileKeys {
  int32_t begin, end, full_begin, full_end;

  __device__ __forceinline__ TileKeys(const AttentionArgs& a, const AttentionRow& row,
                                      int32_t first_token, int32_t last_token, int32_t split,
                                      int32_t splits) {
    // The first token sees the furthest back, the last one the furthest on.
    const KeyRange first = row.visible(a, first_token), last = row.visible(a, last_token);
    begin = first.begin;
    end = last.end;
    full_begin = last.begin;
    full_end = first.end;
    if (splits > 1) {
      const int32_t columns = split_columns(row.length, splits);
      begin = max(begin, split * columns);
      // The last splits may be empty; the end of 64 of them stays below 2^31 + 2^12.
      end = static_cast<int32_t>(min(unsigned(end), unsigned(split + 1) * unsigned(columns)));
    }
    full_end = min(full_end, end);
  }
};

// Where the item `item` of a grid of consecutive items lies.
struct AttentionItem32 {
  AttentionRow row;
  int32_t tile, split, splits;
};

// Every warp looks for itself, 32 rows at a time; false past the last item. Rows of at most
// `min_vectors` vectors have no items.
__device__ __forceinline__ bool find_item(const AttentionArgs& a, int64_t item,
                                          int32_t tile_vectors, int32_t min_vectors,
                                          AttentionItem32& found) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t num_rows = static_cast<int32_t>(a.p.num_rows);
  for (int32_t first = 0; first < num_rows; first += 32) {
    AttentionRow row;
    int64_t items = 0;
    int32_t splits = 1;
    if (first + lane < num_rows && row.load(a, first + lane) && row.vectors > min_vectors) {
      splits = num_splits(row.vectors, row.length);
      items = int64_t{(row.vectors - 1) / tile_vectors + 1} * splits;
    }
    int64_t up_to_here = items;
#pragma unroll
    for (int32_t offset = 1; offset < 32; offset *= 2) {
      const int64_t before = __shfl_up_sync(~0u, up_to_here, offset);
      if (lane >= offset) up_to_here += before;
    }
    const unsigned reached = __ballot_sync(~0u, up_to_here > item);
    if (reached) {
      const int32_t owner = __ffs(static_cast<int>(reached)) - 1;
      const int64_t rest = item - __shfl_sync(~0u, up_to_here - items, owner);
      found.splits = __shfl_sync(~0u, splits, owner);
      found.row.load(a, first + owner);
      found.tile = static_cast<int32_t>(rest / found.splits);
      found.split = static_cast<int32_t>(rest % found.splits);
      return true;
    }
    item -= __shfl_sync(~0u, up_to_here, 31);
  }
  return false;
}

// Number of a vector's partial result of one split. Rows have max_split_vectors places each, or
// their own query tokens' places, whichever takes less memory in this call.
__device__ __forceinline__ int64_t partial_index(const AttentionArgs& a, const AttentionRow& row,
                                                 int32_t vector, int32_t kv_head, int32_t split) {
  const int64_t place = a.partials_by_token ? int64_t{row.first_token} * a.group
                                            : int64_t{row.index} * a.max_split_vectors;
  return ((place + vector) * a.p.sizes.num_kv_heads + kv_head) * a.max_splits + split;
}

// Number of a vector in out and lse.
__device__ __forceinline__ int64_t result_index(const AttentionArgs& a, const AttentionRow& row,
                                                int32_t token, int32_t head) {
  // A result has fewer than 2^31 tokens and heads each.
  return int64_t{row.first_token + token} * static_cast<int32_t>(a.p.num_heads) + head;
}

// Base 2 score of a vector and a key, from their product. Fast: the error of tanh is small beside
// the bound, though not beside tanh, which is enough for scores of 16-bit elements.
template <bool kFast>
__device__ __forceinline__ float finish_score(const AttentionArgs& a, float product, float slope,
                                              int32_t distance) {
  float x = __fmul_rn(product, a.score_scale);
  if (a.p.softcap > 0.0f) {
    const float y = product * a.tanh_scale;
    if constexpr (kFast) {
      constexpr float kLog2e = 1.4426950408889634f;
      x = __fmul_rn(a.tanh_bound,
                    1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(2.0f * kLog2e * y)));
    } else {
      x = __fmul_rn(a.tanh_bound, tanhf(y));
    }
  }
  // Written out, so that no compiler contracts it in one kernel and not in another.
  return fmaf(-slope, static_cast<float>(distance), x);
}

__device__ __forceinline__ float slope_of(const AttentionArgs& a, int32_t head) {
  return a.p.alibi_slopes ? a.p.alibi_slopes[head] * a.slope_scale : 0.0f;
}

// 2^(x - top), and 0 where there is nothing: -inf - -inf would be NaN.
__device__ __forceinline__ float weight_of(float x, float top) {
  return x == -INFINITY ? 0.0f : exp2f(x - top);
}

__device__ __forceinline__ uint4 as_bits(float a, float b, float c, float d) {
  return {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
}
__device__ __forceinline__ float4 as_floats(uint4 x) {
  return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}

// Four consecutive dims in one instruction.
template <typename T>
__device__ __forceinline__ void store_4(T* address, float a, float b, float c, float d) {
  if constexpr (sizeof(T) == 4) {
    store_16(address, as_bits(a, b, c, d));
  } else {
    store_8(address, uint2{pack<T>(a, b), pack<T>(c, d)});
  }
}

// Turns a vector's sums into its result. The sink joins the denominator.
struct Finished {
  float top, total;  // of the denominator
  float factor;      // of the sum of values
};
__device__ __forceinline__ Finished finish_vector(const AttentionArgs& a, int32_t head,
                                                  float maximum, float sum) {
  Finished f{maximum, sum, 1.0f};
  const float sink = a.p.sinks ? a.p.sinks[head] : -INFINITY;
  // A sink of -inf is none.
  if (sink != -INFINITY) {
    const float x = static_cast<float>(sink * a.inverse_unit);
    f.top = fmaxf(maximum, x);
    f.factor = weight_of(maximum, f.top);
    f.total = fmaf(sum, f.factor, exp2f(x - f.top));
  }
  f.factor = sum == 0.0f ? 0.0f : f.factor / f.total;
  return f;
}
__device__ __forceinline__ float finish_lse(const AttentionArgs& a, int32_t head, float sum,
                                            const Finished& f) {
  // Alone, the sink is its own logarithm, to the bit.
  if (sum == 0.0f) return a.p.sinks ? a.p.sinks[head] : -INFINITY;
  return static_cast<float>(f.top * a.log_unit + static_cast<double>(logf(f.total)));
}

// Writes a vector's result, or its partial result when the row is split. `first` for one of the
// lanes that share a vector.
template <typename T>
class VectorWriter {
  float factor_ = 1.0f;
  float* sums_ = nullptr;
  T* out_ = nullptr;

 public:
  __device__ __forceinline__ VectorWriter(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t vector, int32_t token, int32_t head,
                                          int32_t kv_head, int32_t split, int32_t splits,
                                          float maximum, float sum, bool first) {
    if (splits > 1) {
      const int64_t index = partial_index(a, row, vector, kv_head, split);
      sums_ = a.partial_sums + index * a.p.sizes.head_dim;
      if (first) {
        store_8(a.partial_stats + 2 * index, uint2{__float_as_uint(maximum), __float_as_uint(sum)});
      }
      return;
    }
    const Finished finished = finish_vector(a, head, maximum, sum);
    factor_ = finished.factor;
    const int64_t index = result_index(a, row, token, head);
    out_ = static_cast<T*>(a.p.out) + index * a.p.sizes.head_dim;
    if (first && a.p.lse) a.p.lse[index] = finish_lse(a, head, sum, finished);
  }
  // Four consecutive dims.
  __device__ __forceinline__ void put_4(int32_t dim, float a, float b, float c, float d) const {
    if (sums_) {
      store_16(sums_ + dim, as_bits(a, b, c, d));
    } else {
      store_4(out_ + dim, a * factor_, b * factor_, c * factor_, d * factor_);
    }
  }
  // Eight consecutive dims of 16-bit elements.
  __device__ __forceinline__ void put_8(int32_t dim, float4 x, float4 y) const {
    if (sums_) {
      store_16(sums_ + dim, x);
      store_16(sums_ + dim + 4, y);
    } else {
      const float f = factor_;
      store_16(out_ + dim, uint4{pack<T>(x.x * f, x.y * f), pack<T>(x.z * f, x.w * f),
                                 pack<T>(y.x * f, y.y * f), pack<T>(y.z * f, y.w * f)});
    }
  }
  // Two consecutive dims of 16-bit elements.
  __device__ __forceinline__ void put_2(int32_t dim, float a, float b) const {
    if (sums_) {
      store_8(sums_ + dim, uint2{__float_as_uint(a), __float_as_uint(b)});
    } else {
      *reinterpret_cast<uint32_t*>(out_ + dim) = pack<T>(a * factor_, b * factor_);
    }
  }
};

}  // namespace baton::cuda
