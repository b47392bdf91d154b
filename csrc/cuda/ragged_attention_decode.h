// ragged_attention of rows with few query vectors per KV head (a decode step), on tensor cores.
//
// A block of four warps has one (row, KV head, split) and all query vectors of it: 8 per column
// tile, kTiles of them. A warp takes 16 keys at a time, every fourth 16 of the split:
//   S^T = K Q^T    [16 keys, 8 vectors], summed over head_dim
//   O^T += V^T P^T [head_dim, 8 vectors], summed over 16 keys
// so that keys, then dims, fill the 16 rows of m16n8k16 and vectors its 8 columns. With g = lane /
// 4 and t = lane % 4:
//   K  lane has 8 dims at 32 j + 8 t of keys g and g + 8, one 16-byte load each. Its registers are
//   mma
//      operands as they come, because a sum over dims may take them in any order and Q takes the
//      same.
//   V  lane has 8 dims at 64 i + 8 g of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9. A register of two
//   keys'
//      same dim takes one byte permutation.
//   P  comes out of the first product with vectors side by side and is needed with keys side by
//   side:
//      movmatrix.
// Nothing but that goes between loads and products: no shared memory in the loop. The next keys are
// asked for as soon as the products have used the registers of these, and the values likewise, so
// that at any time keys or values are on their way. Warps meet once, at the end, in shared memory.
#pragma once

#include "cuda/attention_launch.h"
#include "cuda/ragged_attention_decode_warp.h"

namespace baton::cuda {

// Blocks per SM that the registers have to leave room for, of 65536 / (128 threads x registers).
constexpr int decode_blocks(int head_dim, int tiles) {
  // Keys and values of one step, sums and queries of a column tile, and what addresses, maxima and
  // temporaries were seen to need. Bytes on their way per SM at best: blocks x 4 warps x 64
  // head_dim.
  const int registers = head_dim / 2 + tiles * (head_dim / 4 + head_dim / 8) + 56;
  if (registers <= 128) return 4;  // 64 to 80 KB
  if (registers <= 168) return 3;  // 48 to 96 KB
  return 2;  // 48 to 128 KB; no thread has more than 255, which is why 256 dims keep no queries
}

// Shared memory: sums of all warps as they lie in the registers [warp][tile][product][lane], then
// maxima and sums [warp][tile][t], then queries.
template <int kHeadDim, int kTiles>
struct DecodeShared {
  static constexpr int kProducts = kHeadDim / 16;
  uint4 out[kAttentionWarps][kTiles][kProducts][32];
  uint4 stats[kAttentionWarps][kTiles][4];
  uint4 queries[decode_queries_in_shared(kHeadDim) ? kHeadDim : 1];
};

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, decode_blocks(kHeadDim, kTiles))
    ragged_attention_decode_kernel(const __grid_constant__ AttentionArgs a) {
  BATON_DYNAMIC_SHARED(memory);
  auto& shared = *reinterpret_cast<DecodeShared<kHeadDim, kTiles>*>(memory);
  using Warp = DecodeWarp<T, kHeadDim, kTiles>;
  constexpr int kProducts = kHeadDim / 16;
  AttentionRow row;
  if (!row.load(a, blockIdx.x) || row.vectors > 8 * kTiles) return;
  const int32_t splits = num_splits(row.vectors, row.length), split = blockIdx.z;
  if (split >= splits) return;
  const TileKeys keys(a, row, 0, row.query_length - 1, split, splits);
  Warp x(a, row, keys);
  x.load_queries(shared.queries);
  x.run();

  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) {
        x.sum[n][c] += __shfl_xor_sync(~0u, x.sum[n][c], offset);
      }
    }
    if (g == 0) {
      store_16(&shared.stats[warp][n][t],
               as_bits(x.maximum[n][0], x.sum[n][0], x.maximum[n][1], x.sum[n][1]));
    }
#pragma unroll
    for (int r = 0; r < kProducts; ++r) {
      const float (&o)[4] = x.out[n][r];
      store_16(&shared.out[warp][n][r][lane], as_bits(o[0], o[1], o[2], o[3]));
    }
  }
  __syncthreads();

  // Every warp sums some of the products over all warps, in order.
  constexpr int kShare = (kProducts + kAttentionWarps - 1) / kAttentionWarps;
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, weight[kAttentionWarps][2];
    float4 stats[kAttentionWarps];
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      stats[w] = as_floats(load_16(&shared.stats[w][n][t]));
      top[0] = fmaxf(top[0], stats[w].x);
      top[1] = fmaxf(top[1], stats[w].z);
    }
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      weight[w][0] = weight_of(stats[w].x, top[0]);
      weight[w][1] = weight_of(stats[w].z, top[1]);
      sum[0] = fmaf(stats[w].y, weight[w][0], sum[0]);
      sum[1] = fmaf(stats[w].w, weight[w][1], sum[1]);
    }
    float out[kShare][4] = {};
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int32_t r = warp * kShare + i;
      if (r >= kProducts) break;
#pragma unroll
      for (int w = 0; w < kAttentionWarps; ++w) {
        const float4 o = as_floats(load_16(&shared.out[w][n][r][lane]));
        out[i][0] = fmaf(o.x, weight[w][0], out[i][0]);
        out[i][1] = fmaf(o.y, weight[w][1], out[i][1]);
        out[i][2] = fmaf(o.z, weight[w][0], out[i][2]);
        out[i][3] = fmaf(o.w, weight[w][1], out[i][3]);
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int32_t vector = 8 * n + 2 * t + c;
      if (vector >= row.vectors) continue;
      VectorWriter<T> writer(a, row, vector, x.token_of(vector), x.head_of(vector), blockIdx.y,
                             split, splits, top[c], sum[c], warp == 0 && g == 0);
      // Two products of one lane are four consecutive dims where both come in pairs.
      constexpr int kStep = kShare % 2 == 0 && kProducts % 2 == 0 ? 2 : 1;
#pragma unroll
      for (int i = 0; i < kShare; i += kStep) {
        const int32_t r = warp * kShare + i;
        if (r >= kProducts) break;
        const float* x = &out[i][c];
        const float* y = &out[i + kStep - 1][c];
        if constexpr (kStep == 2) {
          writer.put_4(Warp::dim_of(r, g), x[0], x[2], y[0], y[2]);
        } else {
          writer.put_2(Warp::dim_of(r, g), x[0], x[2]);
        }
      }
    }
  }
}

template <typename T>
cudaError_t launch_decode(const AttentionArgs& args, dim3 grid, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<64, 80, 96, 128, 256>(args.p.sizes.head_dim, [&]<int kHeadDim>() {
    dispatch_int<8, 16>(args.decode_vectors, [&]<int kVectors>() {
      constexpr int kTiles = kVectors / 8;
      if constexpr (decode_vectors(kHeadDim, kVectors) == kVectors) {
        error =
            launch(ragged_attention_decode_kernel<T, kHeadDim, kTiles>, grid,
                   dim3(kAttentionThreads), sizeof(DecodeShared<kHeadDim, kTiles>), stream, args);
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
