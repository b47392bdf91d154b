// Host side of ragged_attention's tensor core kernels: which calls they serve. The kernels of one
// dtype are compiled by one file, so that no file takes long.
#pragma once

#include <algorithm>

#include "cuda/ragged_attention/rows.h"

namespace baton::cuda {

// Whether every row of queries, keys and values begins at a multiple of 16 bytes.
inline bool loads_16_bytes(const RaggedAttentionParams& p) {
  ChunkSize size;
  size << p.query << p.key_cache << p.value_cache << in_bytes(p.query_strides, p.dtype)
       << in_bytes(p.key_cache_strides, p.dtype) << in_bytes(p.value_cache_strides, p.dtype);
  return size.bytes() == 16;
}

inline bool has_tensor_core_kernel(const RaggedAttentionParams& p) {
  const int64_t d = p.sizes.head_dim;
  // The kernels multiply a key's number by 32 bits of stride.
  const bool strides_fit = in_bytes(p.key_cache_strides, p.dtype).column_stride <= INT32_MAX &&
                           in_bytes(p.value_cache_strides, p.dtype).column_stride <= INT32_MAX;
  return p.dtype != Dtype::kFloat32 && (d == 64 || d == 80 || d == 96 || d == 128 || d == 256) &&
         strides_fit && loads_16_bytes(p);
}

// Query vectors of a tile of the prefill kernel whose warps have 16 each.
constexpr int kTileVectors = 16 * kAttentionWarps;
// Dims of the one whose warps have two such tiles, and the compute capabilities that have it.
constexpr int kTwoTilesDim = 128;
constexpr bool has_two_tiles(int capability) { return capability == 8 || capability == 9; }
// Whether the library has code for these: later devices run the PTX of its newest compute
// capability, and that of 7.5 has none.
#if defined(__CUDA_ARCH_LIST__)
constexpr bool kHasTwoTilesCode = std::max({__CUDA_ARCH_LIST__}) >= 800;
#else
constexpr bool kHasTwoTilesCode = true;
#endif

// The warpgroup kernel's dims and query vectors per tile; the threads of two warpgroups share a
// tile.
constexpr int kWarpgroupDim = 128, kWarpgroupVectors = 128, kConsumerThreads = 256;

// Columns that the decode kernel has for the vectors of this group. A second tile of them doubles
// the products, which only groups that need it pay. 0: rows of one token go to the prefill kernel.
constexpr int32_t decode_vectors(int64_t head_dim, int64_t group) {
  if (group <= 8) return 8;
  // Sums and queries of two column tiles of 256 dims are more registers than a thread has.
  return group <= 16 && head_dim <= 128 ? 16 : 0;
}

// Blocks per SM that the registers of the kernels have to leave room for, of 65536 / (128 threads x
// registers).
constexpr int decode_blocks(int head_dim, int tiles) {
  // Keys and values of one step, sums and queries of a column tile, and what addresses, maxima and
  // temporaries were seen to need. Bytes in flight per SM at best: blocks x 4 warps x 64
  // head_dim.
  const int registers = head_dim / 2 + tiles * (head_dim / 4 + head_dim / 8) + 56;
  if (registers <= 128) return 4;  // 64 to 80 KB
  if (registers <= 168) return 3;  // 48 to 96 KB
  return 2;  // 48 to 128 KB; no thread has more than 255, which is why 256 dims keep no queries
}
constexpr int prefill_blocks(int head_dim) {
  // Sums and queries of 96 dims take 72 registers and leave room for three blocks; those of 256,
  // 192.
  return head_dim <= 96 ? 3 : 2;
}

// Floats that a block's totals take: sums, and the state of each vector. `threads` is the number
// that the block would have with 16 vectors per warp.
constexpr int64_t prefill_totals(int64_t head_dim, int threads) {
  return threads * (head_dim / 2 + 4);
}

// T is __half or __nv_bfloat16. Blocks along y are KV heads; those along x share the items. `tiles`
// of 16 vectors are those of a warp.
template <typename T, bool kPaged>
cudaError_t launch_decode(const AttentionArgs& args, dim3 grid, cudaStream_t stream);
template <typename T, bool kPaged>
cudaError_t launch_prefill(const AttentionArgs& args, int tiles, dim3 grid, cudaStream_t stream);
// In place of the latter, for kWarpgroupDim dims in slots.
template <typename T>
cudaError_t launch_warpgroup(const AttentionArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace baton::cuda
