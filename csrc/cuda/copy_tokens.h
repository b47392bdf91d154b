// Copies packed tokens into a cache or out of it: the common part of insert_kv and extract_kv.
//
// A token's keys of one layer are num_kv_heads x head_dim elements, cut into chunks. A thread has
// one chunk of a token and walks over the consecutive tokens of a tile, keys and values together:
// neighboring lanes touch neighboring chunks on both sides, and addresses advance by one stride per
// token. Which query a tile's tokens belong to is found on the device.
//   threadIdx  x: chunk of the head, y: head, z: tile
//   blockIdx   x: tiles, y: layer, z: heads
#pragma once

#include <algorithm>

#include "cuda/chunk.h"

namespace baton::cuda {

struct CopyTokensArgs {
  char* packed[2];  // keys and values, [num_layers, total_tokens, num_kv_heads, head_dim]
  char* cache[2];   // [num_layers, num_slots, num_kv_heads, capacity, head_dim]
  TokenStrides packed_strides[2];  // in bytes, as all strides here
  CacheStrides cache_strides[2];
  const int32_t* cu_seqlens;
  const int32_t* slots;
  const int32_t* starts;
  int32_t num_queries, num_slots;
  int64_t total_tokens, capacity;
  int32_t num_heads;
  int32_t num_tiles, tile_tokens;
};

// Loads of this many tokens, keys and values, are on their way before the first store.
constexpr int kCopyUnroll = 4;
// Threads of a block, and the most it has when a head alone has more chunks than that.
constexpr int kCopyThreads = 128, kCopyMaxThreads = 256;
// Three blocks for each of the 148 SMs of the largest device (B200) have 48 KB on their way per SM,
// which is what hides its memory's latency. With fewer, shorter tiles make more blocks; with more,
// longer tiles spread the cost of finding the query.
constexpr int64_t kCopyBlocks = 3 * 148;
constexpr int kMaxTileTokens = 32, kMinTileTokens = 4;

// The query that token t belongs to, or -1.
__device__ __forceinline__ int32_t find_query(const int32_t* cu_seqlens, int32_t num_queries,
                                              int32_t t) {
  int32_t low = 0, high = num_queries;  // the first query that begins after t lies in [low, high]
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (cu_seqlens[middle] <= t) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (low == 0 || cu_seqlens[low] <= t) return -1;
  // Values that do not ascend may have led the search astray.
  return cu_seqlens[low - 1] <= t ? low - 1 : -1;
}

template <int kBytes>
__device__ __forceinline__ void copy_run(char* const (&target)[2],
                                         const int64_t (&target_stride)[2],
                                         char* const (&source)[2],
                                         const int64_t (&source_stride)[2], int32_t count) {
  char* to[2] = {target[0], target[1]};
  const char* from[2] = {source[0], source[1]};
#pragma unroll 1
  for (; count >= kCopyUnroll; count -= kCopyUnroll) {
    Chunk<kBytes> chunks[kCopyUnroll][2];
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        chunks[i][j] = load_chunk<kBytes>(from[j]);
        from[j] += source_stride[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kCopyUnroll; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store_chunk<kBytes>(to[j], chunks[i][j]);
        to[j] += target_stride[j];
      }
    }
  }
#pragma unroll 1
  for (; count > 0; --count) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      store_chunk<kBytes>(to[j], load_chunk<kBytes>(from[j]));
      to[j] += target_stride[j];
      from[j] += source_stride[j];
    }
  }
}

// Which chunk and tile a thread has.
struct CopyPlace {
  int64_t layer = blockIdx.y;
  int32_t head = blockIdx.z * blockDim.y + threadIdx.y;
  int32_t chunk = threadIdx.x;
  int32_t tile;  // of the copies, or of the paddings behind them

  __device__ __forceinline__ explicit CopyPlace(int32_t block)
      : tile(block * static_cast<int32_t>(blockDim.z) + static_cast<int32_t>(threadIdx.z)) {}
};

template <int kBytes, bool kIntoCache>
__device__ __forceinline__ void copy_tile(const CopyTokensArgs& a, int32_t block) {
  const CopyPlace place(block);
  if (place.tile >= a.num_tiles || place.head >= a.num_heads) return;
  const int64_t first = int64_t{place.tile} * a.tile_tokens;
  int32_t t = static_cast<int32_t>(first);
  const int32_t end = static_cast<int32_t>(min(first + a.tile_tokens, a.total_tokens));
  while (t < end) {
    const int32_t query = find_query(a.cu_seqlens, a.num_queries, t);
    if (query < 0) return;
    const int32_t begin = a.cu_seqlens[query], next = a.cu_seqlens[query + 1];
    const int32_t slot = a.slots[query], start = a.starts[query];
    const int32_t count = min(end, next) - t;
    if (slot >= 0 && slot < a.num_slots && start >= 0 &&
        int64_t{start} + next - begin <= a.capacity) {
      char* packed[2];
      char* cache[2];
      int64_t packed_stride[2], cache_stride[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const TokenStrides& token = a.packed_strides[j];
        const CacheStrides& column = a.cache_strides[j];
        packed[j] = a.packed[j] + place.layer * token.layer_stride + t * token.token_stride +
                    place.head * token.head_stride + place.chunk * kBytes;
        cache[j] = a.cache[j] + place.layer * column.layer_stride + slot * column.slot_stride +
                   place.head * column.head_stride +
                   (int64_t{start} + t - begin) * column.column_stride + place.chunk * kBytes;
        packed_stride[j] = token.token_stride;
        cache_stride[j] = column.column_stride;
      }
      if constexpr (kIntoCache) {
        copy_run<kBytes>(cache, cache_stride, packed, packed_stride, count);
      } else {
        copy_run<kBytes>(packed, packed_stride, cache, cache_stride, count);
      }
    }
    t += count;
  }
}

// How a copy is laid over the device. Its x dimension is in tiles until the launch.
struct CopyLaunch {
  int chunk_bytes;
  dim3 grid, block;

  // Blocks along x for so many tiles.
  int64_t blocks(int64_t tiles) const { return divide_up(tiles, block.z); }
};

// Fills in what does not depend on the direction.
inline CopyLaunch prepare_copy(CopyTokensArgs& a, const void* const (&packed)[2],
                               const void* const (&cache)[2], const TokenStrides& key_strides,
                               const TokenStrides& value_strides,
                               const CacheStrides& key_cache_strides,
                               const CacheStrides& value_cache_strides, const CacheSizes& sizes,
                               Dtype dtype) {
  const int64_t head_bytes = sizes.head_dim * size_of(dtype);
  a.packed_strides[0] = in_bytes(key_strides, dtype);
  a.packed_strides[1] = in_bytes(value_strides, dtype);
  a.cache_strides[0] = in_bytes(key_cache_strides, dtype);
  a.cache_strides[1] = in_bytes(value_cache_strides, dtype);
  ChunkSize size;
  size << head_bytes;
  for (int j = 0; j < 2; ++j) {
    // One set of arguments serves both directions; the kernel writes one side only.
    a.packed[j] = static_cast<char*>(const_cast<void*>(packed[j]));
    a.cache[j] = static_cast<char*>(const_cast<void*>(cache[j]));
    size << packed[j] << cache[j] << a.packed_strides[j] << a.cache_strides[j];
  }
  a.num_slots = static_cast<int32_t>(sizes.num_slots);
  a.capacity = sizes.capacity;
  a.num_heads = static_cast<int32_t>(sizes.num_kv_heads);

  CopyLaunch launch;
  launch.chunk_bytes = size.bytes();
  const int64_t chunks = head_bytes / size.bytes();
  const int64_t heads = std::clamp<int64_t>(kCopyThreads / chunks, 1, sizes.num_kv_heads);
  // 64 is the most that a block may have along z.
  const int64_t tiles = std::clamp<int64_t>(kCopyThreads / (chunks * heads), 1, 64);
  launch.block = dim3(static_cast<unsigned>(chunks), static_cast<unsigned>(heads),
                      static_cast<unsigned>(tiles));
  launch.grid = dim3(0, static_cast<unsigned>(sizes.num_layers),
                     static_cast<unsigned>(divide_up(sizes.num_kv_heads, heads)));
  for (a.tile_tokens = kMaxTileTokens; a.tile_tokens > kMinTileTokens; a.tile_tokens /= 2) {
    const int64_t blocks = launch.blocks(divide_up(a.total_tokens, a.tile_tokens));
    if (blocks * launch.grid.y * launch.grid.z >= kCopyBlocks) break;
  }
  a.num_tiles = static_cast<int32_t>(divide_up(a.total_tokens, a.tile_tokens));
  return launch;
}

}  // namespace baton::cuda
