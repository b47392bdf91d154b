// Merges the partial results of ragged_attention's split rows, in the order of their keys.
//
// A warp has one vector of a KV head. Of a row that decodes one token, lane i knows the weights of
// splits i and i + 32, and sums 4 dims at a time over all splits. Segments of a row of several
// tokens join one after another, as they do in a block that has all of them.
#pragma once

#include "cuda/device/find_query.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

// A vector's sums, of four dims.
struct MergedDims {
  float top = -INFINITY, sum = 0.0f, values[4] = {};
};

// Of splits [begin, end), whose stats and sums (this lane's dims, if it has any) begin there.
__device__ __forceinline__ MergedDims merge_at_once(const float* stats, const float* sums,
                                                    int32_t head_dim, bool has_dims, int32_t begin,
                                                    int32_t end) {
  static_assert(kMaxSplits == 64, "a lane has two splits");
  const int32_t lane = threadIdx.x % 32;
  MergedDims x;
  float maximum[2], sum[2], weight[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int32_t split = lane + 32 * i;
    maximum[i] = -INFINITY;
    sum[i] = 0.0f;
    if (split >= begin && split < end) {
      const uint2 bits = load_8(stats + 2 * split);
      maximum[i] = __uint_as_float(bits.x);
      sum[i] = __uint_as_float(bits.y);
    }
    x.top = fmaxf(x.top, maximum[i]);
  }
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    x.top = fmaxf(x.top, __shfl_xor_sync(~0u, x.top, offset));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weight[i] = weight_of(maximum[i], x.top);
    sum[i] *= weight[i];
  }
  sums += static_cast<int64_t>(begin) * head_dim;
  // Several loads are on their way at once.
#pragma unroll 4
  for (int32_t split = begin; split < end; ++split, sums += head_dim) {
    x.sum += __shfl_sync(~0u, split < 32 ? sum[0] : sum[1], split % 32);
    const float share = __shfl_sync(~0u, split < 32 ? weight[0] : weight[1], split % 32);
    if (!has_dims) continue;
    const float4 part = as_floats(load_16(sums));
    x.values[0] = fmaf(part.x, share, x.values[0]);
    x.values[1] = fmaf(part.y, share, x.values[1]);
    x.values[2] = fmaf(part.z, share, x.values[2]);
    x.values[3] = fmaf(part.w, share, x.values[3]);
  }
  return x;
}

__device__ __forceinline__ MergedDims merge_in_turn(const float* stats, const float* sums,
                                                    int32_t head_dim, bool has_dims, int32_t begin,
                                                    int32_t end) {
  MergedDims x;
  for (int32_t split = begin; split < end; ++split) {
    const uint2 bits = load_8(stats + 2 * split);
    const Joint joint(x.top, __uint_as_float(bits.x));
    x.top = joint.top;
    x.sum = joint.sum(x.sum, __uint_as_float(bits.y));
    if (!has_dims) continue;
    const float4 part = as_floats(load_16(sums + static_cast<int64_t>(split) * head_dim));
    x.values[0] = joint.sum(x.values[0], part.x);
    x.values[1] = joint.sum(x.values[1], part.y);
    x.values[2] = joint.sum(x.values[2], part.z);
    x.values[3] = joint.sum(x.values[3], part.w);
  }
  return x;
}

template <typename T>
// Six blocks per SM leave 80 registers: with 64 ptxas spills for compute capability 10 and 12, and
// asked for nothing it chooses fewer.
__global__ void __launch_bounds__(kAttentionThreads, 6)
    ragged_attention_merge_kernel(const __grid_constant__ AttentionArgs a) {
  const int32_t kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const int32_t place = blockIdx.x * kAttentionWarps + threadIdx.x / 32;
  if (place >= a.partial_vectors) return;
  // Of the token that has the place, or the row.
  const bool of_tokens = a.max_split_vectors > 0;
  const auto num_rows = static_cast<int32_t>(a.p.num_rows);
  int32_t index = place / a.group;
  if (of_tokens) {
    const int32_t token = index;
    index = find_query<false>(a.p.cu_seqlens, num_rows, token);
    while (index < num_rows && static_cast<int32_t>(load_4(a.p.cu_seqlens + index + 1)) <= token) {
      ++index;
    }
  }
  AttentionRow row;
  if (index >= num_rows || !row.load(a, index)) return;
  const int32_t vector = place - (of_tokens ? row.first_token : row.index) * a.group;
  const int32_t splits = row.splits(a);
  if (splits == 1 || unsigned(vector) >= unsigned(row.vectors)) return;

  const int32_t token = vector / a.group, head = kv_head * a.group + vector - token * a.group;
  const KeyRange keys = row.visible(a, token);
  const bool decodes = row.query_length == 1;
  int32_t begin = 0, end = 0;
  if (keys.begin < keys.end) {
    const int32_t length = decode_split_keys(row.length, splits);
    begin = decodes ? keys.begin / length : num_segments(keys.begin + 1) - 1;
    end = decodes ? (keys.end - 1) / length + 1 : num_segments(keys.end);
  }
  const auto head_dim = static_cast<int32_t>(a.p.sizes.head_dim);
  const int64_t partial = partial_index(a, row, vector, kv_head, 0);
  const float* stats = a.partial_stats + 2 * partial;
  const int64_t result = result_index(a, row, token, head);
  for (int32_t first = 0; first < head_dim; first += 128) {
    const int32_t dim = first + 4 * lane;
    const bool has_dims = dim < head_dim;
    const float* sums = a.partial_sums + partial * head_dim + dim;
    const MergedDims x = decodes ? merge_at_once(stats, sums, head_dim, has_dims, begin, end)
                                 : merge_in_turn(stats, sums, head_dim, has_dims, begin, end);
    const Finished f = finish_vector(a, head, keys.begin < keys.end, x.top, x.sum);
    if (lane == 0 && first == 0 && a.p.lse) a.p.lse[result] = finish_lse(a, head, x.sum, f);
    if (!has_dims) continue;
    T* out = static_cast<T*>(a.p.out) + result * head_dim + dim;
    store_4(out, finish_element(x.values[0], f.factor), finish_element(x.values[1], f.factor),
            finish_element(x.values[2], f.factor), finish_element(x.values[3], f.factor));
  }
}

}  // namespace baton::cuda
