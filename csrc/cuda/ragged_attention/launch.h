// Host side of ragged_attention's tensor core kernels: which calls they serve. The kernels of one
// dtype are compiled by one file, so that no file takes long.
#pragma once

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

// Query vectors that the decode kernel takes for this group. A second column tile doubles the
// products, which only groups that need it pay. 0: rows of such a group go to the prefill kernel.
constexpr int32_t decode_vectors(int64_t head_dim, int64_t group) {
  if (group <= 8) return 8;
  // Sums and queries of two column tiles of 256 dims are more registers than a thread has.
  return group <= 16 && head_dim <= 128 ? 16 : 0;
}

// T is __half or __nv_bfloat16. Grids: (rows, KV heads, splits) and (items, KV heads).
template <typename T>
cudaError_t launch_decode(const AttentionArgs& args, dim3 grid, cudaStream_t stream);
template <typename T>
cudaError_t launch_prefill(const AttentionArgs& args, dim3 grid, cudaStream_t stream);

}  // namespace baton::cuda
