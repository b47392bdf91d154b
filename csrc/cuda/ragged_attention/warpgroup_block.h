// A consumer of the warpgroup kernel with the tiles of keys and values of an item:
//   S = Q K^T   [64 vectors, 128 keys]; Q stays in registers, K is read where it lies
//   O += P V    [64 vectors, 128 dims]; P is S in the registers where it lies, V is read likewise
// Scores of a tile are computed while values of the tile before are weighed.
#pragma once

#include "cuda/ragged_attention/prefill_vectors.h"
#include "cuda/ragged_attention/warpgroup_ring.h"

namespace baton::cuda {

template <typename T>
class WarpgroupBlock : public PrefillVectors<T, kWarpgroupDim, kWarpgroupKeys, kConsumerThreads> {
  using Base = PrefillVectors<T, kWarpgroupDim, kWarpgroupKeys, kConsumerThreads>;
  using Base::a_, Base::out, Base::row_, Base::t_;
  using Base::kKeys, Base::kKeyTiles;
  static constexpr int kDepth = 16;  // of a product

  RingMemory& ring_;
  const ConsumerItem& item_;
  uint32_t query_[kWarpgroupDim / kDepth][4];
  uint32_t weights_[kKeys / kDepth][4];  // of a tile's keys
  float scores_[1][kKeyTiles][4];

 public:
  __device__ __forceinline__ WarpgroupBlock(const AttentionArgs& a, const ConsumerItem& item,
                                            int32_t thread, int32_t first_vector, RingMemory& ring)
      : Base(a, item.row, thread, first_vector), ring_(ring), item_(item) {
    this->load_query_pairs(
        [&](int r, int half, int i, uint32_t pair) { query_[r][2 * half + i] = pair; });
  }

  // Adds the tiles from `first` up to `end`, all of which this warpgroup's vectors see something
  // of. `first` and `place` are those of the next tile when it returns.
  __device__ __forceinline__ void add_tiles(int32_t& first, int32_t end, RingPlace& place) {
    score(place);
    wait_for_products<0>(scores_[0]);
    arrive_as_warp(&ring_.empty[place.stage][0]);
    float factor[2];
    finish(first, factor);
    pack_weights();
    // So far there is nothing to rescale.
    first += kKeys;
    for (; first < end; first += kKeys) {
      const RingPlace following = place.next();
      score(following);
      add_values(first - kKeys, place);
      wait_for_products<1>(scores_[0]);
      arrive_as_warp(&ring_.empty[following.stage][0]);
      finish(first, factor);
      wait_for_products<0>(out[0]);
      arrive_as_warp(&ring_.empty[place.stage][1]);
      this->rescale(factor);
      pack_weights();
      place = following;
    }
    add_values(first - kKeys, place);
    wait_for_products<0>(out[0]);
    arrive_as_warp(&ring_.empty[place.stage][1]);
    place = place.next();
  }

  // Gives back a tile of which this warpgroup's vectors see nothing.
  __device__ __forceinline__ void pass_tile(RingPlace& place) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      wait_for_phase(&ring_.full[place.stage][which], place.parity);
      arrive_as_warp(&ring_.empty[place.stage][which]);
    }
    place = place.next();
  }

 private:
  // Begins the products of queries and a tile of keys.
  __device__ __forceinline__ void score(RingPlace place) {
    wait_for_phase(&ring_.full[place.stage][0], place.parity);
    const uint64_t keys = operand_at(shared_address(ring_.tiles[place.stage][0]), 0, kSwizzleBytes);
    fence_registers();
#pragma unroll
    for (int r = 0; r < kWarpgroupDim / kDepth; ++r) {
      // A panel has 64 dims.
      const uint64_t at = keys + (r / 4 * kPanelBytes + r % 4 * kDepth * sizeof(T)) / 16;
      if (r == 0) {
        multiply_64<T, OperandLayout::kColumns, false>(scores_[0], query_[r], at);
      } else {
        multiply_64<T, OperandLayout::kColumns, true>(scores_[0], query_[r], at);
      }
    }
    commit_products();
  }

  // Turns the products of a tile into probabilities.
  __device__ __forceinline__ void finish(int32_t first, float (&factor)[2]) {
    const TileKeys& keys = item_.keys;
    const bool at_border = first < keys.full_begin || first + kKeys > keys.full_end;
    this->finish_scores(keys, first, at_border, scores_);
    this->weigh_scores(scores_, factor);
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int k = 0; k < kKeyTiles; ++k) {
      weights_[k / 2][k % 2 * 2] = pack<T>(scores_[0][k][0], scores_[0][k][1]);
      weights_[k / 2][k % 2 * 2 + 1] = pack<T>(scores_[0][k][2], scores_[0][k][3]);
    }
  }

  // Begins the products of probabilities and the tile of values whose first column is `first`.
  __device__ __forceinline__ void add_values(int32_t first, RingPlace place) {
    wait_for_phase(&ring_.full[place.stage][1], place.parity);
    const uint4 found = load_16(ring_.not_finite[place.stage]);
    if (found.x | found.y | found.z | found.w) add_from_cache(first);
    const uint64_t values =
        operand_at(shared_address(ring_.tiles[place.stage][1]), kPanelBytes, kSwizzleBytes);
    fence_registers();
#pragma unroll
    for (int k = 0; k < kKeys / kDepth; ++k) {
      multiply_64<T, OperandLayout::kRows, true>(out[0], weights_[k],
                                                 values + k * kDepth * 128 / 16);
    }
    commit_products();
  }

  // The tile has zeros for values that are not finite: they are read from the cache.
  __device__ __forceinline__ void add_from_cache(int32_t first) {
    uint32_t weighs[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const uint32_t pair = weights_[n / 2][n % 2 * 2 + i];
        if (pair & 0x7fff) weighs[i] |= 1u << (2 * n);
        if (pair & 0x7fff0000) weighs[i] |= 2u << (2 * n);
      }
    }
    const CacheStrides& s = a_.p.value_cache_strides;
    const T* values = row_base<T>(row_, false, this->kv_head_, a_.p.value_cache, s) + 2 * t_;
    this->add_not_finite(first, weighs, [&](int32_t key) {
      return values + int64_t{first + key} * s.column_stride;
    });
  }
};

}  // namespace baton::cuda
