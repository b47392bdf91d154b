// extract_kv: key[l, cu_seqlens[i] + t, h] = key_cache[l, slots[i], h, starts[i] + t], value
// likewise, of all layers in one launch. Tokens of a query whose place is out of range are left
// unwritten.
//
// A block has 128 threads and copies tiles of consecutive tokens of one layer (copy_tokens.h): a
// thread has one chunk of a token, 16 bytes where alignment allows, and walks over the tokens of
// its tile, keys and values together.
#include "cuda/copy_tokens.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

template <int kBytes>
__global__ void __launch_bounds__(kCopyMaxThreads)
    extract_kv_kernel(const __grid_constant__ CopyTokensArgs args) {
  copy_tile<kBytes, false>(args, blockIdx.x);
}

}  // namespace

cudaError_t extract_kv(const ExtractKvParams& p, cudaStream_t stream) {
  CopyTokensArgs a{};
  a.cu_seqlens = p.cu_seqlens;
  a.slots = p.slots;
  a.starts = p.starts;
  a.num_queries = static_cast<int32_t>(p.num_queries);
  a.total_tokens = p.total_tokens;
  if (p.num_queries == 0 || p.total_tokens == 0 || p.sizes.num_kv_heads == 0) return cudaSuccess;
  CopyLaunch copy =
      prepare_copy(a, {p.key, p.value}, {p.key_cache, p.value_cache}, p.key_strides,
                   p.value_strides, p.key_cache_strides, p.value_cache_strides, p.sizes, p.dtype);
  if (p.sizes.num_layers == 0) return cudaSuccess;
  copy.grid.x = static_cast<unsigned>(copy.blocks(a.num_tiles));
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(copy.chunk_bytes, [&]<int kBytes>() {
    error = launch(extract_kv_kernel<kBytes>, copy.grid, copy.block, 0, stream, a);
  });
  return error;
}

}  // namespace baton::cuda
