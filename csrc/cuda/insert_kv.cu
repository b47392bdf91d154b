// insert_kv: key_cache[l, slots[i], h, starts[i] + t] = key[l, cu_seqlens[i] + t, h], value
// likewise, of all layers in one launch.
//
// A block has 128 threads and copies tiles of consecutive tokens of one layer (copy_tokens.h): a
// thread has one chunk of a token, 16 bytes where alignment allows, and walks over the tokens of
// its tile, keys and values together. With zero_padding, blocks after those clear the columns
// before the tokens in the same way: a thread has one chunk of a column and walks over the columns
// of a tile of one query's padding; tiles are laid over the whole capacity, since the host does not
// know the starts.
#include "cuda/copy_tokens.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

struct InsertArgs {
  CopyTokensArgs copy;
  int32_t num_copy_blocks;
  int32_t padding_tiles;  // of one query
};

template <int kBytes>
__device__ __forceinline__ void clear_tile(const InsertArgs& args, int32_t block) {
  const CopyTokensArgs& a = args.copy;
  const CopyPlace place(block);
  if (place.tile >= args.padding_tiles * a.num_queries || place.head >= a.num_heads) return;
  const int32_t query = place.tile / args.padding_tiles;
  const int32_t slot = a.slots[query], start = a.starts[query];
  const int64_t length = int64_t{a.cu_seqlens[query + 1]} - a.cu_seqlens[query];
  if (slot < 0 || slot >= a.num_slots || start < 0 || length < 0 || start + length > a.capacity) {
    return;
  }
  const int64_t first = int64_t{place.tile % args.padding_tiles} * a.tile_tokens;
  const int64_t end = min(first + a.tile_tokens, int64_t{start});
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const CacheStrides& strides = a.cache_strides[j];
    char* target = a.cache[j] + place.layer * strides.layer_stride + slot * strides.slot_stride +
                   place.head * strides.head_stride + first * strides.column_stride +
                   place.chunk * kBytes;
    for (int64_t column = first; column < end; ++column) {
      store_chunk<kBytes>(target, Chunk<kBytes>{});
      target += strides.column_stride;
    }
  }
}

template <int kBytes>
__global__ void __launch_bounds__(kCopyMaxThreads)
    insert_kv_kernel(const __grid_constant__ InsertArgs args) {
  const int32_t block = blockIdx.x;
  if (block < args.num_copy_blocks) {
    copy_tile<kBytes, true>(args.copy, block);
  } else {
    clear_tile<kBytes>(args, block - args.num_copy_blocks);
  }
}

}  // namespace

cudaError_t insert_kv(const InsertKvParams& p, cudaStream_t stream) {
  InsertArgs args{};
  CopyTokensArgs& a = args.copy;
  a.cu_seqlens = p.cu_seqlens;
  a.slots = p.slots;
  a.starts = p.starts;
  a.num_queries = static_cast<int32_t>(p.num_queries);
  a.total_tokens = p.total_tokens;
  if (p.num_queries == 0 || p.sizes.num_slots == 0 || p.sizes.num_kv_heads == 0) return cudaSuccess;
  CopyLaunch copy =
      prepare_copy(a, {p.key, p.value}, {p.key_cache, p.value_cache}, p.key_strides,
                   p.value_strides, p.key_cache_strides, p.value_cache_strides, p.sizes, p.dtype);
  const int64_t padding_tiles = p.zero_padding ? divide_up(p.sizes.capacity, a.tile_tokens) : 0;
  const int64_t copies = copy.blocks(a.num_tiles);
  const int64_t blocks = copies + copy.blocks(padding_tiles * p.num_queries);
  if (blocks == 0 || p.sizes.num_layers == 0) return cudaSuccess;
  if (padding_tiles * p.num_queries > INT32_MAX) return cudaErrorInvalidConfiguration;
  args.num_copy_blocks = static_cast<int32_t>(copies);
  args.padding_tiles = static_cast<int32_t>(padding_tiles);
  copy.grid.x = static_cast<unsigned>(blocks);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(copy.chunk_bytes, [&]<int kBytes>() {
    error = launch(insert_kv_kernel<kBytes>, copy.grid, copy.block, 0, stream, args);
  });
  return error;
}

}  // namespace baton::cuda
