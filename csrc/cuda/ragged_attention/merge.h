// Merges the partial results of ragged_attention's split rows, in the order of their keys.
//
// A warp has one vector of a KV head, 4 dims in a lane; where that would be few warps, a vector has
// several, whose lanes have one dim each. It requests the partial results of many splits at once,
// and sums them one after another. Of a row that decodes one token, lane i knows the weights of
// splits i and i + 32. Segments of a row of several tokens join one after another, as they do in a
// block that has all of them.
//
// The kernel is launched behind those that write the partial results: it has found its rows when
// they end.
#pragma once

#include "cuda/device/find_query.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

// Dims of a lane; if at most this many warps of a multiprocessor would have work, one instead.
constexpr int kMergeDims = 4, kMergeWarps = 16;

// Warps of a vector.
__host__ __device__ constexpr int32_t merge_warps(int64_t head_dim, int dims) {
  return dims == 1 ? static_cast<int32_t>((head_dim + 31) / 32) : 1;
}

// Partial results that a lane requests together, limited by its registers.
template <int kDims>
struct PartialDims {
  static constexpr int kCount = 32 / kDims;
  float values[kCount][kDims];

  // Loads this lane's dims of `count` splits; `sums` points to those of the first one.
  __device__ __forceinline__ void load(const float* sums, int32_t head_dim, int32_t count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i >= count) break;
      if constexpr (kDims == 4) {
        const float4 part = as_floats(load_16(sums));
        values[i][0] = part.x;
        values[i][1] = part.y;
        values[i][2] = part.z;
        values[i][3] = part.w;
      } else {
        values[i][0] = __uint_as_float(load_4(sums));
      }
      sums += head_dim;
    }
  }
};

// This lane's dims of a vector's sums.
template <int kDims>
struct MergedDims {
  float top = -INFINITY, sum = 0.0f, values[kDims] = {};
};

// Merges splits [begin, end); `stats` and `sums` (this lane's dims) begin with split `begin`.
template <int kDims>
__device__ __forceinline__ MergedDims<kDims> merge_at_once(const float* stats, const float* sums,
                                                           int32_t head_dim, int32_t begin,
                                                           int32_t end) {
  static_assert(kMaxSplits == 64, "a lane has two splits");
  using Parts = PartialDims<kDims>;
  const int32_t lane = threadIdx.x % 32;
  MergedDims<kDims> x;
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
  }
  // Requested before the wait for the weights.
  Parts parts;
  parts.load(sums + static_cast<int64_t>(begin) * head_dim, head_dim, end - begin);
  x.top = fmaxf(fmaxf(x.top, maximum[0]), maximum[1]);
#pragma unroll
  for (int32_t offset = 16; offset > 0; offset /= 2) {
    x.top = fmaxf(x.top, __shfl_xor_sync(~0u, x.top, offset));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weight[i] = weight_of(maximum[i], x.top);
    sum[i] *= weight[i];
  }
  for (int32_t first = begin; first < end;) {
#pragma unroll
    for (int i = 0; i < Parts::kCount; ++i) {
      const int32_t split = first + i;
      if (split >= end) break;
      // The lane is taken modulo 32.
      x.sum += __shfl_sync(~0u, split < 32 ? sum[0] : sum[1], split);
      const float share = __shfl_sync(~0u, split < 32 ? weight[0] : weight[1], split);
#pragma unroll
      for (int d = 0; d < kDims; ++d) x.values[d] = fmaf(parts.values[i][d], share, x.values[d]);
    }
    first += Parts::kCount;
    if (first < end) {
      parts.load(sums + static_cast<int64_t>(first) * head_dim, head_dim, end - first);
    }
  }
  return x;
}

template <int kDims>
__device__ __forceinline__ MergedDims<kDims> merge_in_turn(const float* stats, const float* sums,
                                                           int32_t head_dim, int32_t begin,
                                                           int32_t end) {
  using Parts = PartialDims<kDims>;
  const int32_t lane = threadIdx.x % 32;
  MergedDims<kDims> x;
  for (int32_t first = begin; first < end; first += Parts::kCount) {
    // Lane i has the stats of split first + i.
    uint2 bits{};
    if (lane < min(Parts::kCount, end - first)) bits = load_8(stats + 2 * (first + lane));
    Parts parts;
    parts.load(sums + static_cast<int64_t>(first) * head_dim, head_dim, end - first);
#pragma unroll
    for (int i = 0; i < Parts::kCount; ++i) {
      if (first + i >= end) break;
      const Joint joint(x.top, __shfl_sync(~0u, __uint_as_float(bits.x), i));
      x.top = joint.top;
      x.sum = joint.sum(x.sum, __shfl_sync(~0u, __uint_as_float(bits.y), i));
#pragma unroll
      for (int d = 0; d < kDims; ++d) x.values[d] = joint.sum(x.values[d], parts.values[i][d]);
    }
  }
  return x;
}

// A vector whose row is split, and the splits that hold keys which it sees.
struct SplitVector {
  AttentionRow row;
  int32_t vector = 0, token = 0, begin = 0, end = 0;

  // Finds the vector that has a place for partial results; false if none has it.
  __device__ __forceinline__ bool find(const AttentionArgs& a, int32_t place) {
    if (place >= a.partial_vectors) return false;
    // A place belongs to a token, or else to a row.
    const bool of_tokens = a.max_split_vectors > 0;
    const auto num_rows = static_cast<int32_t>(a.p.num_rows);
    int32_t index = place / a.group;
    if (of_tokens) {
      const int32_t packed = index;
      index = find_query<false>(a.p.cu_seqlens, num_rows, packed);
      while (index < num_rows &&
             static_cast<int32_t>(load_4(a.p.cu_seqlens + index + 1)) <= packed) {
        ++index;
      }
    }
    if (index >= num_rows || !row.load(a, index)) return false;
    vector = place - (of_tokens ? row.first_token : row.index) * a.group;
    const int32_t splits = row.splits(a);
    if (splits == 1 || unsigned(vector) >= unsigned(row.vectors)) return false;
    token = vector / a.group;
    const KeyRange keys = row.visible(a, token);
    begin = end = 0;
    if (keys.begin < keys.end) {
      const int32_t length = decode_split_keys(row.length, splits);
      const bool decodes = row.query_length == 1;
      begin = decodes ? keys.begin / length : num_segments(keys.begin + 1) - 1;
      end = decodes ? (keys.end - 1) / length + 1 : num_segments(keys.end);
    }
    return true;
  }
};

template <typename T, int kDims>
// Four blocks per SM leave 128 registers, of which 32 are partial results in flight; with the 80
// that six leave ptxas spills.
__global__ void __launch_bounds__(kAttentionThreads, 4)
    ragged_attention_merge_kernel(const __grid_constant__ AttentionArgs a) {
  const auto head_dim = static_cast<int32_t>(a.p.sizes.head_dim);
  const int32_t kv_head = blockIdx.y, lane = threadIdx.x % 32;
  const int32_t warp = blockIdx.x * kAttentionWarps + threadIdx.x / 32;
  const int32_t warps = merge_warps(head_dim, kDims), place = warp / warps;
  SplitVector x;
  const bool found = x.find(a, place);
  wait_for_grid_before();
  if (!found) return;

  const int32_t head = kv_head * a.group + x.vector - x.token * a.group;
  const int64_t partial = partial_index(a, x.row, x.vector, kv_head, 0);
  const float* stats = a.partial_stats + 2 * partial;
  const int64_t result = result_index(a, x.row, x.token, head);
  constexpr int32_t kWarpDims = 32 * kDims;
  for (int32_t first = (warp - place * warps) * kWarpDims; first < head_dim;
       first += warps * kWarpDims) {
    const int32_t dim = first + kDims * lane;
    const bool has_dims = dim < head_dim;
    // Lanes without dims repeat the first ones.
    const float* sums = a.partial_sums + partial * head_dim + (has_dims ? dim : 0);
    const MergedDims<kDims> merged =
        x.row.query_length == 1 ? merge_at_once<kDims>(stats, sums, head_dim, x.begin, x.end)
                                : merge_in_turn<kDims>(stats, sums, head_dim, x.begin, x.end);
    const Finished f = finish_vector(a, head, x.begin < x.end, merged.top, merged.sum);
    if (lane == 0 && first == 0 && a.p.lse) a.p.lse[result] = finish_lse(a, head, merged.sum, f);
    if (!has_dims) continue;
    T* out = static_cast<T*>(a.p.out) + result * head_dim + dim;
    float values[kDims];
#pragma unroll
    for (int d = 0; d < kDims; ++d) values[d] = finish_element(merged.values[d], f.factor);
    if constexpr (kDims == 4) {
      store_4(out, values[0], values[1], values[2], values[3]);
    } else {
      *out = from_float<T>(values[0]);
    }
  }
}

template <typename T>
cudaError_t launch_merge(const AttentionArgs& args, cudaStream_t stream) {
  const int64_t head_dim = args.p.sizes.head_dim, kv_heads = args.p.sizes.num_kv_heads;
  const auto warps = [&](int dims) {
    return int64_t{args.partial_vectors} * merge_warps(head_dim, dims);
  };
  cudaError_t error = cudaErrorInvalidValue;
  const bool many = warps(1) * kv_heads > int64_t{multiprocessors()} * kMergeWarps;
  dispatch_int<1, kMergeDims>(many ? kMergeDims : 1, [&]<int kDims>() {
    const dim3 grid(static_cast<unsigned>(divide_up(warps(kDims), kAttentionWarps)),
                    static_cast<unsigned>(kv_heads));
    error = launch_behind<ragged_attention_merge_kernel<T, kDims>>(grid, dim3(kAttentionThreads), 0,
                                                                   stream, args);
  });
  return error;
}

}  // namespace baton::cuda
