// insert_kv: key_cache[l, slots[i], h, starts[i] + t] = key[l, cu_seqlens[i] + t, h], value
// likewise, of all layers in one launch.
//
// A block has 128 threads, each of which has one chunk, 16 bytes where alignment allows, of a run
// of tokens, layers or heads (device/copy_tokens.h), keys and values together. With zero_padding,
// blocks after those clear the columns before the tokens: a thread has one chunk of a tile of
// columns of one query's padding; tiles are laid over the whole capacity, since the host does not
// know the starts.
#include "cuda/device/copy_tokens.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

// Columns of padding that a thread clears.
constexpr int32_t kClearColumns = 16;

struct InsertArgs {
  CopyTokensArgs copy;
  int32_t num_copy_blocks;
  int32_t padding_tiles;  // of one query
};

template <int kBytes>
__device__ __forceinline__ void clear_tile(const InsertArgs& args, int32_t block) {
  const CopyTokensArgs& a = args.copy;
  const CopyPlace place(a, kBytes, block, args.padding_tiles * a.num_queries);
  if (!ascends(a.cu_seqlens, a.num_queries) || !place.exists) return;
  const int32_t query = place.tile / args.padding_tiles;
  const int32_t slot = a.slots[query], start = a.starts[query];
  const int32_t begin = a.cu_seqlens[query];
  if (begin < 0 || !fits(a, slot, start, begin, a.cu_seqlens[query + 1])) return;
  const int32_t first = place.tile % args.padding_tiles * kClearColumns;
  const int32_t count = min(kClearColumns, start - first), run = run_of(a);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    char* target = place.address(a.cache[j], first) + slot * a.cache[j].slot_stride;
    for (int32_t i = 0; i < count; ++i, target += a.cache[j].token_stride) {
      // Runs of tokens count as one.
      for (int32_t k = 0; k < run; ++k) {
        store_chunk<kBytes>(target + k * a.cache[j].step, Chunk<kBytes>{});
      }
    }
  }
}

template <int kBytes, bool kSame>
__global__ void __launch_bounds__(kCopyMaxThreads)
    insert_kv_kernel(const __grid_constant__ InsertArgs args) {
  const int32_t block = blockIdx.x;
  if (block < args.num_copy_blocks) {
    copy_tile<kBytes, kSame, true>(args.copy, block);
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
  if (p.num_queries == 0 || p.sizes.num_slots == 0 || p.sizes.num_kv_heads == 0 ||
      p.sizes.num_layers == 0) {
    return cudaSuccess;
  }
  CopyLaunch copy = prepare_copy(a, {p.key, p.value}, {p.key_cache, p.value_cache}, p.key_strides,
                                 p.value_strides, p.key_cache_strides, p.value_cache_strides,
                                 p.sizes, p.num_queries, p.total_tokens, p.dtype);
  const int64_t padding_tiles = p.zero_padding ? divide_up(p.sizes.capacity, kClearColumns) : 0;
  const int64_t copies = copy.grid.x;
  const int64_t blocks = copies + divide_up(padding_tiles * p.num_queries, a.block_tiles);
  if (blocks == 0) return cudaSuccess;
  if (padding_tiles * p.num_queries > INT32_MAX || copy.grid.y > kMaxGridYZ ||
      copy.grid.z > kMaxGridYZ) {
    return cudaErrorInvalidConfiguration;
  }
  args.num_copy_blocks = static_cast<int32_t>(copies);
  args.padding_tiles = static_cast<int32_t>(padding_tiles);
  copy.grid.x = static_cast<unsigned>(blocks);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_int<16, 4, 2>(copy.chunk_bytes, [&]<int kBytes>() {
    error = copy.same_strides
                ? launch(insert_kv_kernel<kBytes, true>, copy.grid, copy.block, 0, stream, args)
                : launch(insert_kv_kernel<kBytes, false>, copy.grid, copy.block, 0, stream, args);
  });
  return error;
}

}  // namespace baton::cuda
