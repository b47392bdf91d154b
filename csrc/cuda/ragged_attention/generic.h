// ragged_attention for every dtype, head_dim and alignment, on CUDA cores: float32, head dims
// without a tensor core kernel, and rows that do not start at multiples of 16 bytes.
//
// A block of four warps takes one item after another: kQueries query vectors of a row and KV head,
// and a split of the keys. A lane has 8 consecutive dims of one key; the lanes of a key stand side
// by side, the keys of a warp behind each other, the warps behind each other. Every group of lanes
// keeps a running maximum, sum and sum of values for each of its vectors; at the end of a segment,
// shuffles, then shared memory bring them together, and the warp that writes a vector has its
// totals.
#pragma once

#include "cuda/ragged_attention/pages.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

constexpr int kLaneDims = 8;
// Blocks per SM that the registers have to leave room for: four of 128 spill on sm_120.
constexpr int kGenericBlocks = 3;

inline std::size_t generic_shared_bytes(int64_t queries, int64_t head_dim) {
  return kAttentionWarps * queries * (head_dim + 2) * sizeof(float);
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_dims(const T* address, float (&x)[kLaneDims]) {
  if constexpr (kAligned) {
    constexpr int kElements = 16 / sizeof(T);
    Elements<T, kElements> chunks[kLaneDims / kElements];
#pragma unroll
    for (int i = 0; i < kLaneDims / kElements; ++i) {
      chunks[i].chunk = load_16(address + i * kElements);
    }
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) {
      x[i] = to_float(chunks[i / kElements].values[i % kElements]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) x[i] = to_float(address[i]);
  }
}

// Running softmax of one vector over some of its keys.
struct RunningSoftmax {
  float maximum, sum, values[kLaneDims];

  __device__ __forceinline__ void reset() {
    maximum = -INFINITY;
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) values[i] = 0.0f;
  }
  // Adds another one's keys. Either may have seen none.
  __device__ __forceinline__ void add(float other_maximum, float other_sum,
                                      const float (&other_values)[kLaneDims]) {
    const Joint joint(maximum, other_maximum);
    maximum = joint.top;
    sum = joint.sum(sum, other_sum);
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) values[i] = joint.sum(values[i], other_values[i]);
  }
};

// Writes the item's result, or its partial result when the row is split.
template <typename T>
__device__ __forceinline__ void write_vector(const AttentionArgs& a, const AttentionItem& item,
                                             int32_t vector, int32_t kv_head, int32_t dim,
                                             const RunningSoftmax& x) {
  const int64_t head_dim = a.p.sizes.head_dim;
  const int32_t token = vector / a.group, head = kv_head * a.group + vector % a.group;
  if (item.splits > 1) {
    const int64_t index = partial_index(a, item.row, vector, kv_head, item.split);
    float* sums = a.partial_sums + index * head_dim + dim;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) sums[i] = x.values[i];
    if (dim == 0) {
      a.partial_stats[2 * index] = x.maximum;
      a.partial_stats[2 * index + 1] = x.sum;
    }
    return;
  }
  const Finished finished = finish_vector(a, head, item.row.position(token) >= 0, x.maximum, x.sum);
  const int64_t index = result_index(a, item.row, token, head);
  T* out = static_cast<T*>(a.p.out) + index * head_dim + dim;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i)
    out[i] = from_float<T>(finish_element(x.values[i], finished.factor));
  if (dim == 0 && a.p.lse) a.p.lse[index] = finish_lse(a, head, x.sum, finished);
}

template <typename T, int kQueries, bool kAligned>
__global__ void __launch_bounds__(kAttentionThreads, kGenericBlocks)
    ragged_attention_generic_kernel(const __grid_constant__ AttentionArgs a) {
  static_assert(kQueries <= kAttentionWarps, "a warp has the totals of one vector");
  BATON_DYNAMIC_SHARED(shared);
  let_next_grid_start();
  const RaggedAttentionParams& p = a.p;
  AttentionItem item;
  for (int32_t round = 0; find_item(a, item_of(round), kQueries, true, item); ++round) {
    const AttentionRow& row = item.row;
    const int32_t kv_head = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int32_t head_dim = static_cast<int32_t>(p.sizes.head_dim);
    const int32_t first = item.tile * kQueries, count = min(kQueries, row.vectors - first);
    const TileKeys keys(a, row, first / a.group, (first + count - 1) / a.group, item.split,
                        item.splits);
    // The partial result of a split that no vector sees is not merged.
    if (item.splits > 1 && keys.begin >= keys.end) continue;

    // A power of two of lanes share a key, some of which may have no dims.
    int32_t key_lanes = 1;
    while (key_lanes * kLaneDims < head_dim) key_lanes *= 2;
    const int32_t warp_keys = 32 / key_lanes, dim = lane % key_lanes * kLaneDims;
    const bool has_dims = dim < head_dim;

    float query[kQueries][kLaneDims], slope[kQueries];
    int32_t position[kQueries];
    KeyRange range[kQueries];
    RunningSoftmax softmax[kQueries], total;
    total.reset();
#pragma unroll
    for (int m = 0; m < kQueries; ++m) {
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) query[m][i] = 0.0f;
      slope[m] = 0.0f;
      position[m] = 0;
      range[m] = {0, 0};
      if (m < count) {
        const int32_t token = (first + m) / a.group;
        const int32_t head = kv_head * a.group + (first + m) % a.group;
        if (has_dims) {
          const int64_t index = int64_t{row.first_token} + token;
          load_dims<T, kAligned>(static_cast<const T*>(p.query) +
                                     index * p.query_strides.token_stride +
                                     head * p.query_strides.head_stride + dim,
                                 query[m]);
        }
        slope[m] = slope_of(a, head);
        position[m] = row.position(token);
        range[m] = row.visible(a, token);
      }
    }
    const T* key_base =
        row_base<T>(row, p.block_table, kv_head, p.key_cache, p.key_cache_strides) + dim;
    const T* value_base =
        row_base<T>(row, p.block_table, kv_head, p.value_cache, p.value_cache_strides) + dim;
    float* const results =
        reinterpret_cast<float*>(shared);  // [warp][vector]: values, maximum, sum
    const int32_t result_size = head_dim + 2;

    int32_t begin = keys.begin;
    while (begin < keys.end) {
      // A row that is not split has all its segments here, one after another.
      const int32_t end =
          item.splits > 1 ? keys.end : min(keys.end, segment_begin(num_segments(begin + 1)));
#pragma unroll
      for (int m = 0; m < kQueries; ++m) softmax[m].reset();
      // Steps begin at multiples of their length, whichever vectors share this item: who adds a
      // key depends on the key only.
      const int32_t step = kAttentionWarps * warp_keys;
      for (int64_t base = begin / step * step; base < end; base += step) {
        const int32_t k = static_cast<int32_t>(base) + warp * warp_keys + lane / key_lanes;
        const bool valid = k >= begin && k < end;
        float key[kLaneDims] = {}, value[kLaneDims] = {}, score[kQueries];
        if (valid && has_dims) {
          load_dims<T, kAligned>(key_base + offset_of(a, row, k, p.key_cache_strides), key);
          load_dims<T, kAligned>(value_base + offset_of(a, row, k, p.value_cache_strides), value);
        }
#pragma unroll
        for (int m = 0; m < kQueries; ++m) {
          score[m] = 0.0f;
#pragma unroll
          for (int i = 0; i < kLaneDims; ++i) score[m] = fmaf(query[m][i], key[i], score[m]);
        }
        for (int32_t offset = key_lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
          for (int m = 0; m < kQueries; ++m) score[m] += __shfl_xor_sync(~0u, score[m], offset);
        }
#pragma unroll
        for (int m = 0; m < kQueries; ++m) {
          // A hidden key is skipped, not multiplied by zero.
          if (!valid || k < range[m].begin || k >= range[m].end) continue;
          const float x = finish_score<false>(a, score[m], slope[m], position[m] - k);
          softmax[m].add(x, 1.0f, value);
        }
      }

      // Groups of lanes of the warp, then warps in order.
      for (int32_t offset = key_lanes; offset < 32; offset *= 2) {
#pragma unroll
        for (int m = 0; m < kQueries; ++m) {
          RunningSoftmax& mine = softmax[m];
          const float maximum = __shfl_xor_sync(~0u, mine.maximum, offset);
          const float sum = __shfl_xor_sync(~0u, mine.sum, offset);
          float values[kLaneDims];
#pragma unroll
          for (int i = 0; i < kLaneDims; ++i) {
            values[i] = __shfl_xor_sync(~0u, mine.values[i], offset);
          }
          mine.add(maximum, sum, values);
        }
      }
      if (lane < key_lanes && has_dims) {
#pragma unroll
        for (int m = 0; m < kQueries; ++m) {
          float* result = results + (warp * kQueries + m) * result_size;
#pragma unroll
          for (int i = 0; i < kLaneDims; ++i) result[dim + i] = softmax[m].values[i];
          if (dim == 0) {
            result[head_dim] = softmax[m].maximum;
            result[head_dim + 1] = softmax[m].sum;
          }
        }
      }
      __syncthreads();
      if (warp < count && lane < key_lanes && has_dims) {
        RunningSoftmax segment;
        segment.reset();
        for (int w = 0; w < kAttentionWarps; ++w) {
          const float* result = results + (w * kQueries + warp) * result_size;
          float values[kLaneDims];
#pragma unroll
          for (int i = 0; i < kLaneDims; ++i) values[i] = result[dim + i];
          segment.add(result[head_dim], result[head_dim + 1], values);
        }
        total.add(segment.maximum, segment.sum, segment.values);
      }
      // Before the next segment's, or the next item's.
      __syncthreads();
      begin = end;
    }
    if (warp < count && lane < key_lanes && has_dims) {
      write_vector<T>(a, item, first + warp, kv_head, dim, total);
    }
  }
}

}  // namespace baton::cuda
