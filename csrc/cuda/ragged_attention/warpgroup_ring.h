// The ring of tiles through which the warpgroup kernel's producers hand keys and values to its
// consumers, and the producers themselves.
//
// A stage has a tile of keys and one of values, each with two barriers: `full` ends a phase when
// the producers' four warps have brought the tile, `empty` when the consumers' eight warps are done
// with it. A tile is [2 panels of 64 dims][128 columns][128 bytes] in the 128-byte swizzle.
#pragma once

#include "cuda/device/warpgroup.h"
#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/pages.h"

namespace baton::cuda {

// Columns of a tile. Sums of 128 dims, scores of 128 keys, and queries and probabilities as
// operands are 192 registers of a consumer.
constexpr int kWarpgroupKeys = 128;
constexpr int kProducerThreads = 128, kWarpgroupThreads = kConsumerThreads + kProducerThreads;
// They share the registers that the block was launched with: for each thread the multiple of 8 that
// all threads can have, 168. With more than that the last warpgroup to request its own would wait
// for ever.
constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
constexpr int kLaunchRegisters = 65536 / kWarpgroupThreads / 8 * 8;
static_assert(kConsumerThreads * kConsumerRegisters + kProducerThreads * kProducerRegisters <=
              kWarpgroupThreads * kLaunchRegisters);

// 192 KB. Producers end a tile two copies after it, so four of the six places keep them going.
constexpr int kRingStages = 3;
constexpr int kCopiesAhead = 2;
constexpr int kPanelBytes = kWarpgroupKeys * 128, kSwizzleBytes = 1024;

// A consumer's state during an item. Each thread's copy is kept in shared memory, since registers
// are scarce; an odd number of words puts those of a warp into different banks.
struct ConsumerItem {
  AttentionRow row;
  TileKeys keys;  // of the warpgroup
  int32_t split, splits;
  int32_t block_end;  // of the keys that the block's tile sees
  int32_t round;
};
// A producer's state between two tiles, kept in the same way.
struct ProducerState {
  TileKeys keys;
  int32_t round;
  uint32_t tiles;          // that it has requested
  uint32_t looks_through;  // whether it does so with the last one's values
};
static_assert(sizeof(ConsumerItem) / 4 % 2 == 1 && sizeof(ProducerState) / 4 % 2 == 1);

struct RingMemory {
  alignas(kSwizzleBytes) unsigned char tiles[kRingStages][2][2 * kPanelBytes];  // keys, values
  // For a tile of values that not all vectors see: whether each producer warp found one that is not
  // finite. The tile then has zeros in their place.
  alignas(16) uint32_t not_finite[kRingStages][kProducerThreads / 32];
  uint64_t full[kRingStages][2], empty[kRingStages][2];
  ConsumerItem items[kConsumerThreads];
  ProducerState producers[kProducerThreads];
};

// A position in the ring.
struct RingPlace {
  int32_t stage = 0;
  uint32_t parity = 0;  // of the phase that this round ends

  __device__ __forceinline__ RingPlace next() const {
    return stage + 1 < kRingStages ? RingPlace{stage + 1, parity} : RingPlace{0, parity ^ 1};
  }
};

// Arrives at the barrier once for all lanes of a warp.
__device__ __forceinline__ void arrive_as_warp(uint64_t* barrier) {
  __syncwarp();
  if (thread_index() % 32 == 0) arrive(barrier);
}

template <typename T>
class RingProducer {
  RingMemory& ring_;
  static constexpr int kCopies = kWarpgroupKeys / 8;

 public:
  __device__ __forceinline__ explicit RingProducer(RingMemory& ring) : ring_(ring) {
    state().tiles = 0;
  }

  // Kept in shared memory, because find_item needs the registers.
  __device__ __forceinline__ ProducerState& state() const {
    return ring_.producers[thread_index() % kProducerThreads];
  }

  // Requests all tiles of an item, with zeros for columns that no vector sees.
  __device__ __forceinline__ void bring(const AttentionArgs& a, const AttentionRow& row,
                                        const TileKeys& item_keys) {
    const TileKeys& keys = state().keys = item_keys;
    const auto source_of = [&](const void* cache, const CacheStrides& s) {
      return reinterpret_cast<const char*>(row_base<T>(row, false, blockIdx.y, cache, s)) +
             thread_index() % 16 * 16;
    };
    const char* key = source_of(a.p.key_cache, a.p.key_cache_strides);
    const char* value = source_of(a.p.value_cache, a.p.value_cache_strides);
    for (int32_t first = keys.begin / kWarpgroupKeys * kWarpgroupKeys; first < keys.end;
         first += kWarpgroupKeys) {
      copy(0, key, static_cast<uint32_t>(a.key_column_bytes), keys, first);
      copy(1, value, static_cast<uint32_t>(a.value_column_bytes), keys, first);
      state().looks_through = first < keys.full_begin || first + kWarpgroupKeys > keys.full_end;
      ++state().tiles;
    }
  }

  // Waits for all that was requested.
  __device__ __forceinline__ void finish() {
    if (state().tiles == 0) return;
    static_assert(kCopiesAhead == 2, "the last tiles of keys and of values");
    copy_async_wait<0>();
    hand_over(0);
    hand_over(1);
  }

 private:
  // A thread copies the same 16 bytes of every eighth column, which the swizzle leaves in a line.
  // None of this is kept in registers, which find_item needs.
  __device__ __forceinline__ static uint32_t column() { return thread_index() % 128 / 16; }
  __device__ __forceinline__ static uint32_t place() {
    const uint32_t thread = thread_index() % 128, column = thread / 16;
    return thread % 16 / 8 * kPanelBytes + column * 128 + (thread % 8 ^ column % 8) * 16;
  }

  __device__ __forceinline__ void copy(int which, const char* source, uint32_t stride,
                                       const TileKeys& keys, int32_t first) {
    const uint32_t tile = state().tiles, stage = tile % kRingStages;
    // Waits for the phase before the one that this tile ends.
    wait_for_phase(&ring_.empty[stage][which], tile / kRingStages % 2 ^ 1);
    unsigned char* target = ring_.tiles[stage][which] + place();
    const uint32_t column_of_thread = column();
    if (first >= keys.begin && first + kWarpgroupKeys <= keys.end) {
      source += uint64_t{first + column_of_thread} * stride;
#pragma unroll
      for (int i = 0; i < kCopies; ++i, source += 8 * uint64_t{stride}) {
        copy_async_16(target + i * kSwizzleBytes, source);
      }
    } else {
#pragma unroll 4
      for (int i = 0; i < kCopies; ++i) {
        const auto column = static_cast<int32_t>(first + column_of_thread + 8 * i);
        const bool valid = column >= keys.begin && column < keys.end;
        const auto at = static_cast<uint32_t>(valid ? column : keys.begin);
        copy_async_16(target + i * kSwizzleBytes, source + uint64_t{at} * stride, valid);
      }
    }
    copy_async_commit();
    if (tile == 0) return;
    // The tile before has arrived once at most this many later copies are in flight.
    copy_async_wait<kCopiesAhead>();
    hand_over(which);
  }

  // Gives the consumers the tile before the one requested last; it has arrived.
  __device__ __forceinline__ void hand_over(int which) {
    const uint32_t stage = (state().tiles - 1) % kRingStages;
    if (which == 1) {
      const bool found = state().looks_through && clear_not_finite(ring_.tiles[stage][1] + place());
      const bool any = __any_sync(~0u, found);
      const uint32_t thread = thread_index() % 128;
      if (thread % 32 == 0) ring_.not_finite[stage][thread / 32] = any;
    }
    fence_products();
    arrive_as_warp(&ring_.full[stage][which]);
  }

  // Replaces this thread's values that are not finite by zeros; returns whether there were any.
  __device__ __forceinline__ bool clear_not_finite(unsigned char* values) const {
    uint32_t found = 0;
#pragma unroll 2
    for (int i = 0; i < kCopies; ++i, values += kSwizzleBytes) {
      uint4 x = load_16(values);
      const auto clear = [](uint32_t& pair) {
        const uint32_t bad = non_finite<T>(pair);
        pair &= ~((bad >> 15) * 0xffff);
        return bad;
      };
      const uint32_t bad = clear(x.x) | clear(x.y) | clear(x.z) | clear(x.w);
      if (bad) store_16(values, x);
      found |= bad;
    }
    return found != 0;
  }
};

}  // namespace baton::cuda
