// Merges the partial results of ragged_attention's split rows, in the order of their keys.
//
// A block of four warps has the vectors of one row and KV head; a warp takes every fourth vector.
// Lane i knows the weights of splits i and i + 32, and sums 4 dims at a time over all splits.
#pragma once

#include "cuda/ragged_attention/rows.h"

namespace baton::cuda {

template <typename T>
// Eight blocks per SM leave 64 registers: asked for nothing, ptxas chooses fewer for compute
// capability 10 and 12, and spills.
__global__ void __launch_bounds__(kAttentionThreads, 8)
    ragged_attention_merge_kernel(const __grid_constant__ AttentionArgs a) {
  static_assert(kAttentionMaxSplits == 64, "a lane has two splits");
  AttentionRow row;
  if (!row.load(a, blockIdx.x)) return;
  const int32_t splits = num_splits(row.vectors, row.length);
  if (splits == 1) return;
  const int32_t kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const int32_t head_dim = static_cast<int32_t>(a.p.sizes.head_dim);
  for (int32_t vector = threadIdx.x / 32; vector < row.vectors; vector += kAttentionWarps) {
    const int64_t index = partial_index(a, row, vector, kv_head, 0);
    float maximum[2], sum[2], weight[2];
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t split = lane + 32 * i;
      maximum[i] = -INFINITY;
      sum[i] = 0.0f;
      if (split < splits) {
        maximum[i] = a.partial_stats[2 * (index + split)];
        sum[i] = a.partial_stats[2 * (index + split) + 1];
      }
      top = fmaxf(top, maximum[i]);
    }
#pragma unroll
    for (int32_t offset = 16; offset > 0; offset /= 2) {
      top = fmaxf(top, __shfl_xor_sync(~0u, top, offset));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      weight[i] = weight_of(maximum[i], top);
      sum[i] *= weight[i];
    }
    float total = 0.0f;
    for (int32_t split = 0; split < splits; ++split) {
      total += __shfl_sync(~0u, split < 32 ? sum[0] : sum[1], split % 32);
    }
    const int32_t token = vector / a.group, head = kv_head * a.group + vector % a.group;
    const Finished finished = finish_vector(a, head, top, total);
    const float factor = finished.factor;
    const int64_t result = result_index(a, row, token, head);
    for (int32_t first = 0; first < head_dim; first += 128) {
      const int32_t dim = first + 4 * lane;
      const float* sums = a.partial_sums + index * head_dim + dim;
      float values[4] = {};
      // Several loads are on their way at once.
#pragma unroll 4
      for (int32_t split = 0; split < splits; ++split, sums += head_dim) {
        const float share = __shfl_sync(~0u, split < 32 ? weight[0] : weight[1], split % 32);
        if (dim >= head_dim) continue;
        const uint4 bits = load_16(sums);
        values[0] = fmaf(__uint_as_float(bits.x), share, values[0]);
        values[1] = fmaf(__uint_as_float(bits.y), share, values[1]);
        values[2] = fmaf(__uint_as_float(bits.z), share, values[2]);
        values[3] = fmaf(__uint_as_float(bits.w), share, values[3]);
      }
      if (dim >= head_dim) continue;
      T* out = static_cast<T*>(a.p.out) + result * head_dim + dim;
      store_4(out, values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor);
    }
    if (lane == 0 && a.p.lse) a.p.lse[result] = finish_lse(a, head, total, finished);
  }
}

}  // namespace baton::cuda
