// ragged_attention of rows that decode one token, on tensor cores.
//
// A block of four warps takes one (row, KV head, split) after another and all query vectors of it:
// 8 per column tile, kTiles of them. A warp takes 16 keys at a time, every fourth 16 of the split:
//   S^T = K Q^T    [16 keys, 8 vectors], summed over head_dim
//   O^T += V^T P^T [head_dim, 8 vectors], summed over 16 keys
// so that keys, then dims, fill the 16 rows of m16n8k16 and vectors its 8 columns. With g = lane /
// 4 and t = lane % 4:
//
// - K: a lane has 8 dims at 32 j + 8 t of keys g and g + 8, one 16-byte load each. Its registers
//   are mma operands as they come, because a sum over dims may take them in any order and Q takes
//   the same.
// - V: a lane has 8 dims at 64 i + 8 g of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9. A register of two
//   keys' same dim takes one byte permutation.
// - P comes out of the first product with vectors side by side and is needed with keys side by
//   side: movmatrix.
//
// Nothing but that goes between loads and products: no shared memory in the loop. The next keys are
// requested as soon as the products have used the registers of these, and the values likewise;
// docs/cuda.md counts what is in flight. Warps meet once, at the end, in shared memory.
#pragma once

#include "cuda/ragged_attention/decode_warp.h"
#include "cuda/ragged_attention/launch.h"

namespace baton::cuda {

// Where the sums of all warps meet.
template <int kHeadDim, int kTiles>
struct DecodeShared {
  // A lane has kHeadDim / 8 dims of a vector, eight by eight side by side.
  static constexpr int kQuads = (kHeadDim / 8 + 3) / 4;
  float4 out[kAttentionWarps][kTiles][kQuads][2][32];  // four dims of vector 2 t or 2 t + 1
  float2 stats[kAttentionWarps][8 * kTiles];           // maximum and sum
  uint4 queries[kTiles * kHeadDim];

  // Place of a lane's four dims of vector 2 t + c. Warps write all lanes with one c, and read
  // neighboring vectors, then neighboring g, of those that exist: the eight that one wavefront
  // serves are in different banks both ways, whether there are 1, 2, 4 or 8 vectors.
  static __device__ __forceinline__ unsigned place(unsigned lane, unsigned c) {
    return lane ^ lane >> 3 ^ 6 * c;
  }
};

template <typename T, int kHeadDim, int kTiles, bool kPaged>
__device__ __forceinline__ void decode_items(const AttentionArgs& a, unsigned char* memory) {
  using Shared = DecodeShared<kHeadDim, kTiles>;
  auto& shared = *reinterpret_cast<Shared*>(memory);
  using Warp = DecodeWarp<T, kHeadDim, kTiles, kPaged>;
  constexpr int kProducts = kHeadDim / 16;
  constexpr int kWhole = kHeadDim / 64, kRest = kHeadDim % 64;
  static_assert(kRest == 0 || kRest == 16 || kRest == 32);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  // If every item has a block, its row follows from the block's number: the splits of one row lie
  // side by side, and blocks of splits that a row does not have find nothing.
  AttentionRow row;
  for (int32_t round = 0; item_of(round) < a.decode_items; ++round) {
    int32_t index, split;
    if (a.decode_items <= static_cast<int32_t>(gridDim.x)) {
      index = static_cast<int32_t>(blockIdx.x / unsigned(a.max_splits));
      split = static_cast<int32_t>(blockIdx.x) - index * a.max_splits;
    } else if (!find_row<int32_t>(a, item_of(round), 8 * kTiles, true, false, index, split)) {
      return;
    }
    // One tile has all vectors of a row of one token.
    if (!row.load(a, index) || row.query_length > 1) return;
    const int32_t splits = decode_splits(row.length);
    if (split >= splits) return;
    const TileKeys keys(a, row, 0, 0, split, splits);
    // The partial result of a split that no vector sees is not merged.
    if (splits > 1 && keys.begin >= keys.end) continue;
    Warp x(a, row, keys);
    const int32_t first = keys.begin + static_cast<int32_t>(warp) * kStepKeys;
    // Requested before the wait for the queries.
    if (first < keys.end) x.load_keys(first);
    x.load_queries(shared.queries);
    const auto publish = [&](int n, int c, int quad, float4 dims) {
      store_16(&shared.out[warp][n][quad][c][Shared::place(lane, c)], dims);
    };
    if (first < keys.end) {
      x.run(first);
      x.add_up();
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (lane < 4) {
          store_16(&shared.stats[warp][8 * n + 2 * lane],
                   float4{x.maximum[n][0], x.sum[n][0], x.maximum[n][1], x.sum[n][1]});
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
          for (int q = 0; q < Shared::kQuads; ++q) {
            // Rows g and g + 8 of a product are two dims; 80 dims end with half a quad.
            const float (&low)[4] = x.out[n][2 * q];
            const float (&high)[4] = x.out[n][2 * q + 1 < kProducts ? 2 * q + 1 : 2 * q];
            publish(n, c, q, float4{low[c], low[c + 2], high[c], high[c + 2]});
          }
        }
      }
    } else {
      // A separate branch, so that the other one's registers need no zeros.
      if (lane < 4 * kTiles) {
        store_16(&shared.stats[warp][2 * lane], float4{kNoScore, 0.0f, kNoScore, 0.0f});
      }
#pragma unroll
      for (int q = 0; q < 2 * kTiles * Shared::kQuads; ++q) {
        publish(q / 2 / Shared::kQuads, q % 2, q / 2 % Shared::kQuads, float4{});
      }
    }
    // After this barrier all sums are published. The next item publishes its own only after a later
    // barrier, that of its queries.
    __syncthreads();

    // A thread sums its g's dims of one vector over all warps, in order. Vectors come first,
    // rounded up to a power of two; a group of four takes one warp.
    const unsigned g = threadIdx.x >> a.decode_shift, vector = threadIdx.x - (g << a.decode_shift);
    if (g >= 8 || vector >= unsigned(row.vectors)) continue;
    float2 stats[kAttentionWarps];
    float top = kNoScore, sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      const uint2 bits = load_8(&shared.stats[w][vector]);
      stats[w] = {__uint_as_float(bits.x), __uint_as_float(bits.y)};
      top = fmaxf(top, stats[w].x);
    }
    float4 out[Shared::kQuads] = {};
    const unsigned place = Shared::place(4 * g + vector / 2 % 4, vector % 2);
#pragma unroll
    for (int w = 0; w < kAttentionWarps; ++w) {
      // A warp that saw no keys adds nothing: its weight is 0, or its sums are.
      const float weight = exp2_fast(stats[w].x - top);
      sum = fmaf(stats[w].y, weight, sum);
#pragma unroll
      for (int q = 0; q < Shared::kQuads; ++q) {
        const float4 x = as_floats(load_16(&shared.out[w][vector / 8][q][vector % 2][place]));
        out[q].x = fmaf(x.x, weight, out[q].x);
        out[q].y = fmaf(x.y, weight, out[q].y);
        out[q].z = fmaf(x.z, weight, out[q].z);
        out[q].w = fmaf(x.w, weight, out[q].w);
      }
    }
    VectorWriter<T> writer(a, row, vector, 0, x.head_of(vector), blockIdx.y, split, splits, top,
                           sum, g == 0);
#pragma unroll
    for (int i = 0; i < kWhole; ++i) writer.put_8(64 * i + 8 * g, out[2 * i], out[2 * i + 1]);
    const float4& last = out[Shared::kQuads - 1];
    if constexpr (kRest == 32) {
      writer.put_4(64 * kWhole + 4 * g, last.x, last.y, last.z, last.w);
    } else if constexpr (kRest == 16) {
      writer.put_2(64 * kWhole + 2 * g, last.x, last.y);
    }
  }
}

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, decode_blocks(kHeadDim, kTiles))
    ragged_attention_decode_kernel(const __grid_constant__ AttentionArgs a) {
  BATON_DYNAMIC_SHARED(memory);
  let_next_grid_start();
  decode_items<T, kHeadDim, kTiles, false>(a, memory);
}

// With a block table.
template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, decode_blocks(kHeadDim, kTiles))
    ragged_attention_paged_decode_kernel(const __grid_constant__ AttentionArgs a) {
  BATON_DYNAMIC_SHARED(memory);
  let_next_grid_start();
  decode_items<T, kHeadDim, kTiles, true>(a, memory);
}

template <typename T, bool kPaged>
cudaError_t launch_decode(const AttentionArgs& args, dim3 grid, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<64, 80, 96, 128, 256>(args.p.sizes.head_dim, [&]<int kHeadDim>() {
    dispatch_int<8, 16>(decode_vectors(kHeadDim, args.group), [&]<int kVectors>() {
      constexpr int kTiles = kVectors / 8;
      if constexpr (decode_vectors(kHeadDim, kVectors) == kVectors) {
        const auto launch_kernel = [&](auto kernel) {
          error = launch(kernel, grid, dim3(kAttentionThreads),
                         sizeof(DecodeShared<kHeadDim, kTiles>), stream, args);
        };
        if constexpr (kPaged) {
          launch_kernel(ragged_attention_paged_decode_kernel<T, kHeadDim, kTiles>);
        } else {
          launch_kernel(ragged_attention_decode_kernel<T, kHeadDim, kTiles>);
        }
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
