// extract_kv: key[l, cu_seqlens[i] + t, h] = key_cache[l, slots[i], h, starts[i] + t], value
// likewise, of all layers in one launch. Tokens of a query whose place is out of range are left
// unwritten.
//
// A block has 128 threads, each of which has one chunk, 16 bytes where alignment allows, of a run
// of tokens, layers or heads (device/copy_tokens.h), keys and values together.
#include "cuda/device/copy_tokens.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

template <int kBytes, bool kSame>
__global__ void __launch_bounds__(kCopyMaxThreads)
    extract_kv_kernel(const __grid_constant__ CopyTokensArgs args) {
  copy_tile<kBytes, kSame, false>(args, blockIdx.x);
}

}  // namespace

cudaError_t extract_kv(const ExtractKvParams& p, cudaStream_t stream) {
  CopyTokensArgs a{};
  a.cu_seqlens = p.cu_seqlens;
  a.slots = p.slots;
  a.starts = p.starts;
  if (p.num_queries == 0 || p.total_tokens == 0 || p.sizes.num_kv_heads == 0 ||
      p.sizes.num_layers == 0) {
    return cudaSuccess;
  }
  const CopyLaunch copy = prepare_copy(
      a, {p.key, p.value}, {p.key_cache, p.value_cache}, p.key_strides, p.value_strides,
      p.key_cache_strides, p.value_cache_strides, p.sizes, p.num_queries, p.total_tokens, p.dtype);
  if (copy.grid.y > kMaxGridYZ || copy.grid.z > kMaxGridYZ) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(copy.chunk_bytes, [&]<int kBytes>() {
    error = copy.same_strides
                ? launch(extract_kv_kernel<kBytes, true>, copy.grid, copy.block, 0, stream, a)
                : launch(extract_kv_kernel<kBytes, false>, copy.grid, copy.block, 0, stream, a);
  });
  return error;
}

}  // namespace baton::cuda
