// A block of ragged_attention's prefill kernel with one tile of query vectors: copies keys and
// values, scores and weighs them. prefill.h tells how the work is divided.
#pragma once

#include "cuda/ragged_attention/prefill_sizes.h"
#include "cuda/ragged_attention/prefill_vectors.h"

namespace baton::cuda {

// Parked until the end of an item.
struct PrefillItem {
  int32_t round, row, split, splits;
};

template <typename T, int kHeadDim, int kTiles, bool kPaged>
class PrefillBlock
    : public PrefillVectors<T, kHeadDim, prefill_keys(kHeadDim), kAttentionThreads, kTiles> {
  using Base = PrefillVectors<T, kHeadDim, prefill_keys(kHeadDim), kAttentionThreads, kTiles>;

 public:
  using Base::kDimTiles, Base::kKeys, Base::kKeyTiles, Base::kVectors, Base::out;
  static constexpr int kPitch = prefill_pitch(kHeadDim);

 private:
  using Base::a_, Base::lane_, Base::row_, Base::t_, Base::thread_;
  // 128 registers of sums leave no registers for either.
  static constexpr bool kKeepsBases = !kPaged && kTiles * kHeadDim <= 128,
                        kParksBorder = kTiles * kHeadDim > 128;
  const char* cache_[2];  // base_of a row in a slot
  uint32_t stride_[2];    // bytes
  T* shared_;             // [stage][keys, values][kKeys][kPitch]
  static constexpr int kRegisterProducts = prefill_register_dims(kHeadDim, kTiles) / 16;
  static constexpr int kCacheElements = prefill_cache_elements(kHeadDim);
  static constexpr int kQueryPitch = prefill_query_pitch(kHeadDim, kTiles);
  uint32_t query_[kTiles][kRegisterProducts > 0 ? kRegisterProducts : 1][4];

 public:
  __device__ __forceinline__ PrefillBlock(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t thread, int32_t first_vector, T* shared)
      : Base(a, row, thread, first_vector), shared_(shared) {
    if constexpr (kKeepsBases) {
      cache_[0] = base_of(0);
      cache_[1] = base_of(1);
    }
    stride_[0] = static_cast<uint32_t>(a.key_column_bytes);
    stride_[1] = static_cast<uint32_t>(a.value_column_bytes);
  }

  // Stores values that are needed later and have no registers meanwhile.
  __device__ __forceinline__ void park(const PrefillItem& item, const TileKeys& keys) {
    // Until here lanes may read those of the item before.
    __syncwarp();
    if (lane_ == 0) {
      store_16(parked(0), uint4{unsigned(item.round), unsigned(item.row), unsigned(item.split),
                                unsigned(item.splits)});
      if constexpr (kParksBorder) {
        store_8(parked(1), uint2{unsigned(keys.full_begin), unsigned(keys.full_end)});
      }
    }
    __syncwarp();
  }
  __device__ __forceinline__ PrefillItem parked_item() const {
    const uint4 x = load_16(parked(0));
    return {static_cast<int32_t>(x.x), static_cast<int32_t>(x.y), static_cast<int32_t>(x.z),
            static_cast<int32_t>(x.w)};
  }

  // Vectors past the end get zeros. Other lanes may read queries after the next barrier.
  __device__ __forceinline__ void load_queries() {
    this->load_query_pairs([&](int r, int half, int i, uint32_t pair) {
      if (r < kRegisterProducts) {
        query_[i / 2][r][2 * half + i % 2] = pair;
      } else {
        T* target = shared_queries() + (lane_ / 4 + 8 * i) * kQueryPitch +
                    16 * (r - kRegisterProducts) + 8 * half + 2 * t_;
        *reinterpret_cast<uint32_t*>(target) = pair;
      }
    });
  }

  // Requests the keys and values of one tile; zeros for those that nobody sees.
  __device__ __forceinline__ void copy_tile(const TileKeys& keys, int32_t first, int stage) {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kTileChunks = kKeys * kChunks;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      T* target = tile(stage, which);
      // Computed again for each tile if there is no register to keep it in.
      const char* const base = kKeepsBases ? cache_[which] : base_of(which);
#pragma unroll
      for (int i = 0; i < (kTileChunks - 1) / kAttentionThreads + 1; ++i) {
        const int32_t c = thread_ + i * kAttentionThreads;
        if (kTileChunks % kAttentionThreads != 0 && c >= kTileChunks) break;
        const int32_t key = c / kChunks, chunk = c % kChunks;
        const bool valid = first + key >= keys.begin && first + key < keys.end;
        auto k = static_cast<uint32_t>(valid ? first + key : keys.begin);
        const char* cache = base;
        if constexpr (kPaged) {
          // Loaded again, since there are no registers to keep it between two copies.
          AttentionRow row{};
          row.index = parked_item().row;
          row.start = static_cast<int32_t>(load_4(a_.p.starts + row.index));
          const PagePlace place = place_of(a_, row, static_cast<int32_t>(k));
          const CacheStrides& s = which ? a_.p.value_cache_strides : a_.p.key_cache_strides;
          cache += place.page * s.slot_stride * int64_t{sizeof(T)};
          k = static_cast<uint32_t>(place.column);
        }
        copy_async_16(target + key * kPitch + 8 * chunk,
                      cache + uint64_t{k} * stride_[which] + 16 * chunk, valid);
      }
    }
    copy_async_commit();
  }

  // Adds one tile of which this warp's vectors see something.
  __device__ __forceinline__ void add_tile(TileKeys keys, int32_t first, int stage) {
    if constexpr (kParksBorder) {
      const uint2 border = load_8(parked(1));
      keys.full_begin = static_cast<int32_t>(border.x);
      keys.full_end = static_cast<int32_t>(border.y);
    }
    float scores[kTiles][kKeyTiles][4] = {};
    score(scores, tile(stage, 0));
    const bool at_border = first < keys.full_begin || first + kKeys > keys.full_end;
    this->finish_scores(keys, first, at_border, scores);
    float factor[kVectors];
    this->weigh_scores(scores, factor);
    this->rescale(factor);
    if (at_border && !all_finite(tile(stage, 1))) {
      weigh_apart(first, scores, tile(stage, 1));
    } else {
      weigh(scores, tile(stage, 1));
    }
  }

 private:
  // Where keys, or values, are counted from.
  __device__ __forceinline__ const char* base_of(int which) const {
    int32_t kv_head = this->kv_head_;
    if constexpr (!kKeepsBases) hide(kv_head);
    AttentionRow row = row_;
    if constexpr (!kKeepsBases && !kPaged) {
      const auto index = parked_item().row;
      row.slot = static_cast<int32_t>(load_4(a_.p.slots + index));
      row.start = static_cast<int32_t>(load_4(a_.p.starts + index));
    }
    const void* cache = which ? a_.p.value_cache : a_.p.key_cache;
    const CacheStrides& s = which ? a_.p.value_cache_strides : a_.p.key_cache_strides;
    return reinterpret_cast<const char*>(row_base<T>(row, kPaged, kv_head, cache, s));
  }
  // One of this warp's two places of 16 bytes, between rows of keys.
  __device__ __forceinline__ T* parked(int place) const {
    int32_t thread = threadIdx.x;
    // Computed again: there is no register to keep the address in.
    hide(thread);
    return shared_ + (2 * (thread / 32) + place) * kPitch + kHeadDim;
  }
  // This warp's queries.
  __device__ __forceinline__ T* shared_queries() const {
    return shared_ + kCacheElements + thread_ / 32 * 16 * kTiles * kQueryPitch;
  }
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return shared_ + (2 * stage + which) * kKeys * kPitch;
  }

  __device__ __forceinline__ void score(float (&scores)[kTiles][kKeyTiles][4],
                                        const T* keys) const {
    // Rows that this lane names for ldmatrix: 16 keys, two halves of 16 dims.
    const T* row = keys + (lane_ / 16 * 8 + lane_ % 8) * kPitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int r = 0; r < kHeadDim / 16; ++r) {
      uint32_t query[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        if (r < kRegisterProducts) {
#pragma unroll
          for (int i = 0; i < 4; ++i) query[m][i] = query_[m][r][i];
        } else {
          load_matrix(query[m], shared_queries() + (16 * m + lane_ % 16) * kQueryPitch +
                                    lane_ / 16 * 8 + 16 * (r - kRegisterProducts));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        load_matrix(b, row + 8 * n * kPitch + 16 * r);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_16<T>(scores[m][n], query[m], {b[0], b[1]});
          multiply_16<T>(scores[m][n + 1], query[m], {b[2], b[3]});
        }
      }
    }
  }

  // Whether a tile of values has neither NaN nor infinity.
  __device__ __forceinline__ bool all_finite(const T* values) const {
    constexpr int kGroups = kKeyTiles * (kHeadDim / 8);
    uint32_t found = 0;
    const int32_t lane = Base::lane_again();
    // Eight lanes take the same chunk of eight rows, which lie in different banks.
#pragma unroll 2
    for (int32_t group = lane / 8; group < kGroups; group += 4) {
      const int32_t key = group % kKeyTiles * 8 + lane % 8, chunk = group / kKeyTiles;
      const uint4 x = load_16(values + key * kPitch + 8 * chunk);
      found |= non_finite<T>(x.x) | non_finite<T>(x.y) | non_finite<T>(x.z) | non_finite<T>(x.w);
    }
    return !__any_sync(~0u, found != 0);
  }

  __device__ __forceinline__ void weigh(const float (&scores)[kTiles][kKeyTiles][4],
                                        const T* values) {
    weigh_with(scores, values, [](uint32_t bits) { return bits; });
  }

  // The same for tiles in which 0 times a hidden value may be NaN: adds finite values first, then
  // each of the others only for the vectors that see it.
  __device__ __forceinline__ void weigh_apart(int32_t first,
                                              const float (&scores)[kTiles][kKeyTiles][4],
                                              const T* values) {
    uint32_t weighs[kVectors] = {};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float x = scores[i / 2][n][i % 2 * 2 + c];
          weighs[i] |= x > kVanishing<T> ? 1u << (2 * n + c) : 0u;
        }
      }
    }
    weigh_with(scores, values, [](uint32_t bits) {
      // Clears elements that are not finite: their sign bit is spread to all of their bits.
      return bits & ~((non_finite<T>(bits) >> 15) * 0xffff);
    });
    this->add_not_finite(first, weighs,
                         [&](int32_t key) { return values + key * kPitch + 2 * t_; });
  }

  // operand(bits of two keys' values of a dim) goes into the products.
  template <typename Operand>
  __device__ __forceinline__ void weigh_with(const float (&scores)[kTiles][kKeyTiles][4],
                                             const T* values, Operand&& operand) {
    const T* row = values + (lane_ / 8 % 2 * 8 + lane_ % 8) * kPitch + lane_ / 16 * 8;
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      uint32_t p[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* x = &scores[m][k + i / 2][i % 2 * 2];
          p[m][i] = pack<T>(x[0], x[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        load_matrix_transposed(b, row + 8 * k * kPitch + 8 * n);
#pragma unroll
        for (int i = 0; i < 4; ++i) b[i] = operand(b[i]);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          multiply_16<T>(out[m][n], p[m], {b[0], b[1]});
          multiply_16<T>(out[m][n + 1], p[m], {b[2], b[3]});
        }
      }
    }
  }
};

}  // namespace baton::cuda
