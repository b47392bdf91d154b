// ragged_attention of rows with many query vectors per KV head (prefill, chunks), on tensor cores.
//
// A block of four warps takes one item after another: a tile of 64 or 128 consecutive query vectors
// of a row and KV head (tokens x heads of the group), and the keys of one split, or of all
// segments, whose sums then join the totals in the order of the segments. Each warp has one or two
// tiles of 16 vectors, all dims; two share what is read of keys and values. Keys and values of a
// tile of columns are copied by cp.async into shared memory, one tile ahead of the products, which
// are m16n8k16:
//   S = Q K^T   [16 vectors, keys]; Q stays in registers where they have room, K comes by ldmatrix
//   O += P V    [16 vectors, dims]; P is S in the registers where it lies, V comes by transposed
//   ldmatrix
// Tiles of columns that no vector of the block sees are not loaded, those that no vector of a warp
// sees are not computed, and only tiles at the border of what is visible are masked. There a value
// that is not finite has to be kept from the vectors that do not see its key, since 0 times it is
// NaN: of tiles that have one, such values are weighed apart. With g = lane / 4 and t = lane % 4 a
// lane has vectors g and g + 8 of each tile.
//
// The result of a vector depends only on the keys that it sees: tiles and segments begin at fixed
// columns of the row, and hidden keys, or those that no vector of its warp sees, add nothing.
#pragma once

#include "cuda/ragged_attention/prefill_tile.h"

namespace baton::cuda {

template <typename T, int kHeadDim, int kTiles, bool kPaged>
__device__ __forceinline__ void prefill_items(const AttentionArgs& a, unsigned char* memory) {
  using Block = PrefillBlock<T, kHeadDim, kTiles, kPaged>;
  constexpr int kBlockVectors = kTiles * kTileVectors;
  AttentionItem item;
  for (int32_t round = 0; find_item(a, item_of(round), kBlockVectors, !a.has_decode, item);
       ++round) {
    const AttentionRow& row = item.row;
    // Addresses that are the same for all items must not stay in registers for that reason.
    int32_t thread = threadIdx.x;
    hide(thread);
    // The last tile of a causal row is its longest: first, so that nobody ends with it.
    const int32_t tile = (row.vectors - 1) / kBlockVectors - item.tile;
    const int32_t block_first = tile * kBlockVectors;
    const int32_t warp_first = block_first + thread / 32 * 16 * kTiles;
    const auto keys_of = [&](int32_t first, int32_t count) {
      const int32_t last = min(first + count, row.vectors) - 1;
      return TileKeys(a, row, min(first, last) / a.group, last / a.group, item.split, item.splits);
    };
    const TileKeys block_keys = keys_of(block_first, kBlockVectors);
    // The partial result of a split that no vector sees is not merged.
    if (item.splits > 1 && block_keys.begin >= block_keys.end) continue;
    TileKeys keys = keys_of(warp_first, 16 * kTiles);
    if (warp_first >= row.vectors) keys.end = 0;  // nobody to see anything

    Block x(a, row, thread, warp_first, reinterpret_cast<T*>(memory));
    x.park({round, row.index, item.split, item.splits}, keys);
    int32_t first = block_keys.begin / Block::kKeys * Block::kKeys;
    if (block_keys.begin < block_keys.end) x.copy_tile(block_keys, first, 0);
    x.load_queries();
    const bool streams = item.splits == 1;
    for (int stage = 0; first < block_keys.end; first += Block::kKeys, stage ^= 1) {
      if (streams && first % attention_segment_keys(0) == 0 && keys.begin < first) {
        const int32_t last = num_segments(first) - 1;
        if (first == segment_begin(last + 1)) {
          // Queries are loaded again instead of being kept in registers.
          x.begin_segment(keys.begin < segment_begin(last));
          x.load_queries();
        }
      }
      if (first + Block::kKeys < block_keys.end) {
        x.copy_tile(block_keys, first + Block::kKeys, stage ^ 1);
        copy_async_wait<1>();
      } else {
        copy_async_wait<0>();
      }
      // All threads' parts of the tile have arrived.
      __syncthreads();
      if (first < keys.end && first + Block::kKeys > keys.begin) x.add_tile(keys, first, stage);
      // All threads have read the tile before the next copy begins.
      __syncthreads();
    }
    int32_t end = block_keys.end;
    hide(end);
    x.end_segments(streams && keys.begin < segment_begin(num_segments(end) - 1));
    const PrefillItem kept = x.parked_item();
    round = kept.round;
    x.write(kept.row, kept.split, kept.splits);
  }
}

// Whether there is code for the kernel.
template <int kTiles>
constexpr bool kHasPrefill = kTiles == 1 || has_two_tiles(BATON_ARCH / 100);

template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, prefill_blocks(kHeadDim))
    ragged_attention_prefill_kernel(const __grid_constant__ AttentionArgs a) {
  if constexpr (kHasPrefill<kTiles>) {
    BATON_DYNAMIC_SHARED(memory);
    let_next_grid_start();
    prefill_items<T, kHeadDim, kTiles, false>(a, memory);
  }
}

// With a block table.
template <typename T, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kAttentionThreads, prefill_blocks(kHeadDim))
    ragged_attention_paged_prefill_kernel(const __grid_constant__ AttentionArgs a) {
  if constexpr (kHasPrefill<kTiles>) {
    BATON_DYNAMIC_SHARED(memory);
    let_next_grid_start();
    prefill_items<T, kHeadDim, kTiles, true>(a, memory);
  }
}

template <typename T, bool kPaged>
cudaError_t launch_prefill(const AttentionArgs& args, int tiles, dim3 grid, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  const auto launch_kernel = [&](auto kernel, std::size_t shared_bytes) {
    error = launch(kernel, grid, dim3(kAttentionThreads), shared_bytes, stream, args);
  };
  const auto launch_tiles = [&]<int kHeadDim, int kTiles>() {
    constexpr std::size_t kShared = prefill_shared_bytes(kHeadDim, kTiles);
    if constexpr (kPaged) {
      launch_kernel(ragged_attention_paged_prefill_kernel<T, kHeadDim, kTiles>, kShared);
    } else {
      launch_kernel(ragged_attention_prefill_kernel<T, kHeadDim, kTiles>, kShared);
    }
  };
  if (tiles == 2) {
    launch_tiles.template operator()<kTwoTilesDim, 2>();
  } else {
    dispatch_int<64, 80, 96, 128, 256>(args.p.sizes.head_dim, [&]<int kHeadDim>() {
      launch_tiles.template operator()<kHeadDim, 1>();
    });
  }
  return error;
}

}  // namespace baton::cuda
