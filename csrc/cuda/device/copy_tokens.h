// Copies packed tokens into a cache or out of it: the common part of insert_kv and extract_kv.
//
// A head of a token is cut into chunks. A thread has one chunk and walks over a run, keys and
// values together: consecutive tokens of a tile, or one token's heads, or its layers, whichever
// makes the longest run; addresses advance by one stride each. Neighboring lanes have neighboring
// chunks, then the next tile. Which query a tile's tokens belong to is found on the device, once
// per run.
//   threadIdx  x: chunk of the head, then tile
//   blockIdx   x: tiles, y: layers and z: heads; for runs of heads the other way round
#pragma once

#include <algorithm>

#include "cuda/device/chunk.h"
#include "cuda/device/find_query.h"

namespace baton::cuda {

// Packed keys or values, [num_layers, total_tokens, num_kv_heads, head_dim], or a cache,
// [num_layers, num_slots, num_kv_heads, capacity, head_dim]. Strides in bytes: between neighbors in
// the grid along y and along z, between tokens or columns, and between the items of a run.
struct CopySide {
  char* data;
  int64_t y_stride, z_stride, token_stride, slot_stride, step;
};

struct CopyTokensArgs {
  CopySide packed[2], cache[2];             // keys and values
  int64_t packed_distance, cache_distance;  // from keys to values, where their strides are the same
  const int32_t* cu_seqlens;
  const int32_t* slots;
  const int32_t* starts;
  int32_t num_queries, num_slots, total_tokens, capacity;
  int32_t tile_tokens;  // of a thread: more than one when the run is one of tokens
  int32_t run;          // of a thread, when it is one of layers or heads; else 1
  int32_t length;       // of all threads' runs along y
  int32_t num_tiles, block_tiles;
  int32_t chunks;       // of a head
  int32_t chunk_magic;  // (x * chunk_magic) >> 16 is x / chunks for any thread
};

// Items of a run whose loads, of keys and values, are in flight before the first store.
constexpr int kCopyUnroll = 8;
// Threads of a block, and its limit when a single head has more chunks than that.
constexpr int kCopyThreads = 128, kCopyMaxThreads = 256;
// Two blocks for each of the 148 SMs of the largest device (B200) have 64 KB in flight per SM,
// where 43 hide its memory's latency. With fewer, shorter runs make more blocks; with more, longer
// runs spread the cost of finding the query.
constexpr int64_t kCopyBlocks = 2 * 148;
constexpr int64_t kMaxRun = 32, kMinRun = 2 * kCopyUnroll;

// `count` items of a run; all loads of kAtOnce come before the first store.
template <int kBytes, int kAtOnce = kCopyUnroll>
__device__ __forceinline__ void copy_run(char* (&to)[2], const int64_t (&to_step)[2],
                                         char* (&from)[2], const int64_t (&from_step)[2],
                                         int32_t count) {
#pragma unroll 1
  for (; count >= kAtOnce; count -= kAtOnce) {
    Chunk<kBytes> chunks[kAtOnce][2];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        chunks[i][j] = load_and_advance<kBytes>(from[j], from_step[j]);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        store_and_advance<kBytes>(to[j], to_step[j], chunks[i][j]);
      }
    }
  }
  if constexpr (kAtOnce > 1) {
    if (count > 0) copy_run<kBytes, kAtOnce / 2>(to, to_step, from, from_step, count);
  }
}

// A thread's tile and chunk.
struct CopyPlace {
  int32_t tile, offset;  // in bytes, of its chunk
  bool exists;

  // `block` of the copies, or of the paddings behind them; there are `num_tiles` tiles.
  __device__ __forceinline__ CopyPlace(const CopyTokensArgs& a, int32_t chunk_bytes, int32_t block,
                                       int32_t num_tiles) {
    const int32_t thread = threadIdx.x, local = thread * a.chunk_magic >> 16;
    tile = block * a.block_tiles + local;
    offset = (thread - local * a.chunks) * chunk_bytes;
    exists = local < a.block_tiles && tile < num_tiles;
  }
  // The address of the first item of the thread's run.
  __device__ __forceinline__ char* address(const CopySide& x, int32_t token) const {
    return x.data + blockIdx.y * x.y_stride + blockIdx.z * x.z_stride + token * x.token_stride +
           offset;
  }
};

// Items of a thread's run, apart from tokens.
__device__ __forceinline__ int32_t run_of(const CopyTokensArgs& a) {
  return min(a.run, a.length - static_cast<int32_t>(blockIdx.y) * a.run);
}

// Whether the query of tokens [begin, end) has a place.
__device__ __forceinline__ bool fits(const CopyTokensArgs& a, int32_t slot, int32_t start,
                                     int32_t begin, int32_t end) {
  // As unsigned numbers, negative ones are too large.
  const unsigned length = unsigned(end) - unsigned(begin), capacity = a.capacity;
  return unsigned(slot) < unsigned(a.num_slots) && length <= capacity &&
         unsigned(start) <= capacity - length && end <= a.total_tokens;
}

// kSame: the strides of keys are those of values, which saves half of the address arithmetic.
template <int kBytes, bool kSame, bool kIntoCache>
__device__ __forceinline__ void copy_tile(const CopyTokensArgs& a, int32_t block) {
  const CopyPlace place(a, kBytes, block, a.num_tiles);
  int32_t t = place.tile * a.tile_tokens;
  hide(t);
  if (a.num_queries > 32 && !ascends(a.cu_seqlens, a.num_queries)) return;
  // The query of the warp's first tile; the others advance from there.
  int32_t query = find_query<true>(a.cu_seqlens, a.num_queries, __shfl_sync(~0u, t, 0));
  if (!place.exists) return;
  const int32_t end = t + min(a.tile_tokens, a.total_tokens - t);
  while (true) {
    int32_t next;
    // Apart from the copy, so that lanes of different queries copy together.
    while (true) {
      if (query >= a.num_queries) return;
      next = static_cast<int32_t>(load_4(a.cu_seqlens + query + 1));
      if (next > t) break;
      ++query;
    }
    const auto begin = static_cast<int32_t>(load_4(a.cu_seqlens + query));
    const auto slot = static_cast<int32_t>(load_4(a.slots + query));
    const auto start = static_cast<int32_t>(load_4(a.starts + query));
    const int32_t tokens = min(end, next) - t;
    // Bounds that do not ascend are ignored; so is a negative one, which is too large as unsigned.
    if (unsigned(begin) <= unsigned(t) && fits(a, slot, start, begin, next)) {
      const auto in_cache = [&](const CopySide& x) {
        return place.address(x, start + (t - begin)) + slot * x.slot_stride;
      };
      char* packed[2] = {place.address(a.packed[0], t), nullptr};
      char* cache[2] = {in_cache(a.cache[0]), nullptr};
      packed[1] = kSame ? packed[0] + a.packed_distance : place.address(a.packed[1], t);
      cache[1] = kSame ? cache[0] + a.cache_distance : in_cache(a.cache[1]);
      const int64_t packed_step[2] = {a.packed[0].step, a.packed[!kSame].step};
      const int64_t cache_step[2] = {a.cache[0].step, a.cache[!kSame].step};
      int32_t count = tokens * run_of(a);
      hide(count);
      if constexpr (kIntoCache) {
        copy_run<kBytes>(cache, cache_step, packed, packed_step, count);
      } else {
        copy_run<kBytes>(packed, packed_step, cache, cache_step, count);
      }
    }
    t += tokens;
    if (t >= end) return;
    ++query;
  }
}

// How a copy is laid over the device. The x dimension of its grid is that of the copies.
struct CopyLaunch {
  int chunk_bytes;
  bool same_strides;  // of keys and values
  dim3 grid, block;
};

// Fills in what does not depend on the direction, but for cu_seqlens, slots and starts.
inline CopyLaunch prepare_copy(CopyTokensArgs& a, const void* const (&packed)[2],
                               const void* const (&cache)[2], const TokenStrides& key_strides,
                               const TokenStrides& value_strides,
                               const CacheStrides& key_cache_strides,
                               const CacheStrides& value_cache_strides, const CacheSizes& sizes,
                               int64_t num_queries, int64_t total_tokens, Dtype dtype) {
  const int64_t head_bytes = sizes.head_dim * size_of(dtype);
  const TokenStrides token[2] = {in_bytes(key_strides, dtype), in_bytes(value_strides, dtype)};
  const CacheStrides column[2] = {in_bytes(key_cache_strides, dtype),
                                  in_bytes(value_cache_strides, dtype)};
  ChunkSize size;
  size << head_bytes;
  for (int j = 0; j < 2; ++j) size << packed[j] << cache[j] << token[j] << column[j];
  const auto narrow = [](int64_t x) {
    return static_cast<int32_t>(std::min<int64_t>(x, INT32_MAX));
  };
  // Tokens and columns beyond 32 bits cannot be named by indices.
  a.total_tokens = narrow(total_tokens);
  a.capacity = narrow(sizes.capacity);
  a.num_queries = narrow(num_queries);
  a.num_slots = narrow(sizes.num_slots);
  a.chunks = static_cast<int32_t>(head_bytes / size.bytes());
  a.chunk_magic = 65535 / a.chunks + 1;
  a.block_tiles = a.chunks < kCopyThreads ? kCopyThreads / a.chunks : 1;
  // Whole warps, which look for the query together.
  const int64_t threads = divide_up(std::max(kCopyThreads, a.chunks), 32) * 32;

  // The longest run of all, as long as there are enough blocks.
  const int64_t layers = sizes.num_layers, heads = sizes.num_kv_heads;
  // Consecutive tokens of a query, limited so that every thread of a block has some.
  const int64_t tokens = total_tokens / std::max<int64_t>(num_queries, a.block_tiles);
  const bool of_tokens = tokens >= std::max(layers, heads), of_layers = layers >= heads;
  const int64_t along_y = of_tokens || of_layers ? layers : heads;
  const int64_t along_z = layers * heads / along_y;
  const int64_t longest = of_tokens ? tokens : along_y;
  CopyLaunch launch{size.bytes(), token[0] == token[1] && column[0] == column[1], dim3(),
                    dim3(static_cast<unsigned>(threads))};
  for (int64_t run = std::min(longest, kMaxRun);; run = divide_up(run, 2)) {
    a.tile_tokens = static_cast<int32_t>(of_tokens ? run : 1);
    a.run = static_cast<int32_t>(of_tokens ? 1 : run);
    a.num_tiles = narrow(divide_up(a.total_tokens, a.tile_tokens));
    launch.grid =
        dim3(static_cast<unsigned>(divide_up(a.num_tiles, a.block_tiles)),
             static_cast<unsigned>(divide_up(along_y, a.run)), static_cast<unsigned>(along_z));
    const int64_t blocks = int64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    if (blocks >= kCopyBlocks || run <= kMinRun) break;
  }
  a.length = narrow(of_tokens ? launch.grid.y : along_y);
  for (int j = 0; j < 2; ++j) {
    const auto side = [&](const void* data, int64_t layer, int64_t head, int64_t in_query,
                          int64_t slot) {
      const int64_t y = of_tokens || of_layers ? layer : head, z = layer + head - y;
      // One set of arguments serves both directions; the kernel writes one side only.
      return CopySide{static_cast<char*>(const_cast<void*>(data)),
                      y * a.run,
                      z,
                      in_query,
                      slot,
                      of_tokens ? in_query : y};
    };
    a.packed[j] =
        side(packed[j], token[j].layer_stride, token[j].head_stride, token[j].token_stride, 0);
    a.cache[j] = side(cache[j], column[j].layer_stride, column[j].head_stride,
                      column[j].column_stride, column[j].slot_stride);
  }
  a.packed_distance = a.packed[1].data - a.packed[0].data;
  a.cache_distance = a.cache[1].data - a.cache[0].data;
  return launch;
}

}  // namespace baton::cuda
