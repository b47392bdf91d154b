// ragged_attention of rows with several tokens on compute capability 9.0: products of warpgroups.
//
// A block has two warpgroups of consumers, with 64 query vectors of one tile each
// (warpgroup_block.h), and one of producers, which copies tiles of 128 keys and of 128 values ahead
// of them (warpgroup_ring.h). Blocks take items as those of the prefill kernel do, and all that is
// said there of bits holds here: tiles and segments begin at fixed columns, a segment begins from
// nothing, and nothing is decided over several vectors that changes a sum. The bits themselves
// differ from that kernel's: a tile has other keys, and a product another depth inside.
#pragma once

#include "cuda/ragged_attention/warpgroup_block.h"

namespace baton::cuda {

// Calls use(item, first vector of the tile, the keys that the tile sees) for this block's items, of
// which `round` counts the rounds.
template <typename Use>
__device__ __forceinline__ void for_warpgroup_items(const AttentionArgs& a, int32_t& round,
                                                    Use&& use) {
  AttentionItem item;
  for (round = 0; find_item(a, item_of(round), kWarpgroupVectors, false, item); ++round) {
    const AttentionRow& row = item.row;
    // The last tile of a causal row is its longest: first, so that nobody ends with it.
    const int32_t first = ((row.vectors - 1) / kWarpgroupVectors - item.tile) * kWarpgroupVectors;
    const int32_t last = min(first + kWarpgroupVectors, row.vectors) - 1;
    const TileKeys keys(a, row, first / a.group, last / a.group, item.split, item.splits);
    // The partial result of a split that no vector sees is not merged.
    if (item.splits > 1 && keys.begin >= keys.end) continue;
    use(item, first, keys);
  }
}

template <typename T>
__device__ __forceinline__ void consume_items(const AttentionArgs& a, RingMemory& ring) {
  RingPlace place;
  ConsumerItem& item = ring.items[thread_index()];
  for_warpgroup_items(
      a, item.round,
      [&](const AttentionItem& found, int32_t block_first, const TileKeys& block_keys) {
        const auto thread = static_cast<int32_t>(thread_index());
        const int32_t group_first = block_first + thread / 128 * 64;
        const int32_t group_last = min(group_first + 64, found.row.vectors) - 1;
        item = {found.row,
                TileKeys(a, found.row, min(group_first, group_last) / a.group, group_last / a.group,
                         found.split, found.splits),
                found.split,
                found.splits,
                block_keys.end,
                item.round};
        if (group_first >= found.row.vectors) item.keys.end = 0;  // nobody to see anything
        const TileKeys& keys = item.keys;
        WarpgroupBlock<T> x(a, item, thread, block_first + thread / 32 * 16, ring);

        int32_t first = block_keys.begin / kWarpgroupKeys * kWarpgroupKeys;
        for (; first < item.block_end && first + kWarpgroupKeys <= keys.begin;
             first += kWarpgroupKeys) {
          x.pass_tile(place);
        }
        // Whether an earlier segment than the one that ends here is seen, so that there are totals.
        const auto has_totals = [&](int32_t end) {
          return keys.begin < segment_begin(num_segments(end) - 1);
        };
        while (first < keys.end) {
          // All segments one after another, or this split's segment.
          const int32_t segment_end = segment_begin(num_segments(first + 1));
          x.add_tiles(first, min(segment_end, keys.end), place);
          if (first >= keys.end) break;
          x.begin_segment(has_totals(first));
        }
        x.end_segments(has_totals(keys.end));
        for (; first < item.block_end; first += kWarpgroupKeys) x.pass_tile(place);
        x.write(item.row.index, item.split, item.splits);
      });
}

template <typename T>
__global__ void __launch_bounds__(kWarpgroupThreads, 1)
    ragged_attention_warpgroup_kernel(const __grid_constant__ AttentionArgs a) {
  BATON_ALIGNED_SHARED(memory, 1024);
  RingMemory& ring = *reinterpret_cast<RingMemory*>(memory);
  // The swizzle depends on addresses.
  static_assert(kSwizzleBytes == 1024);
  if (shared_address(memory) % kSwizzleBytes != 0) __trap();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kRingStages; ++stage) {
      for (int which = 0; which < 2; ++which) {
        init_barrier(&ring.full[stage][which], kProducerThreads / 32);
        init_barrier(&ring.empty[stage][which], kConsumerThreads / 32);
      }
    }
  }
  __syncthreads();
  if (threadIdx.x >= kConsumerThreads) {
    give_registers_back<kProducerRegisters>();
    RingProducer<T> producer(ring);
    for_warpgroup_items(a, producer.state().round,
                        [&](const AttentionItem& item, int32_t, const TileKeys& keys) {
                          producer.bring(a, item.row, keys);
                        });
    producer.finish();
  } else {
    take_registers<kConsumerRegisters>();
    consume_items<T>(a, ring);
  }
}

}  // namespace baton::cuda
