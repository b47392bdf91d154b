// What a block of ragged_attention's prefill kernel does with one tile of query vectors: copies
// keys and values, scores and weighs them. prefill.h tells how the work is divided.
#pragma once

#include "cuda/ragged_attention/prefill_sizes.h"
#include "cuda/ragged_attention/prefill_vectors.h"

namespace baton::cuda {

template <typename T, int kHeadDim, bool kPaged>
class PrefillBlock : public PrefillVectors<T, kHeadDim, prefill_keys(kHeadDim), kAttentionThreads> {
  using Base = PrefillVectors<T, kHeadDim, prefill_keys(kHeadDim), kAttentionThreads>;

 public:
  using Base::kDimTiles, Base::kKeys, Base::kKeyTiles, Base::out;
  static constexpr int kPitch = prefill_pitch(kHeadDim);
  static constexpr bool kSegments = prefill_has_segments(kHeadDim);
  static constexpr std::size_t kParked = prefill_parked(kHeadDim);

 private:
  using Base::a_, Base::first_, Base::lane_, Base::row_, Base::t_, Base::thread_;
  const char* cache_[2];  // base_of a row in a slot
  uint32_t stride_[2];    // bytes
  T* shared_;             // [stage][keys, values][kKeys][kPitch]
  static constexpr int kRegisterProducts = prefill_register_dims(kHeadDim) / 16;
  static constexpr int kCacheElements = prefill_cache_elements(kHeadDim);
  static constexpr int kQueryPitch = prefill_query_pitch(kHeadDim);
  uint32_t query_[kRegisterProducts][4];

 public:
  __device__ __forceinline__ PrefillBlock(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t thread, int32_t first_vector, T* shared)
      : Base(a, row, thread, first_vector), shared_(shared) {
    if constexpr (!kPaged) {
      cache_[0] = base_of(0);
      cache_[1] = base_of(1);
    }
    stride_[0] = static_cast<uint32_t>(a.key_column_bytes);
    stride_[1] = static_cast<uint32_t>(a.value_column_bytes);
  }

  // Of vectors past the end: zeros.
  __device__ __forceinline__ void load_queries() {
    this->load_query_pairs([&](int r, int half, int i, uint32_t pair) {
      if (r < kRegisterProducts) {
        query_[r][2 * half + i] = pair;
      } else {
        T* target = shared_queries() + (lane_ / 4 + 8 * i) * kQueryPitch +
                    16 * (r - kRegisterProducts) + 8 * half + 2 * t_;
        *reinterpret_cast<uint32_t*>(target) = pair;
      }
    });
    // A warp reads its own queries only.
    if constexpr (kQueryPitch > 0) __syncwarp();
  }

  // Requests the keys and values of one tile; zeros for those that nobody sees.
  __device__ __forceinline__ void copy_tile(const TileKeys& keys, int32_t first, int stage) {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kTileChunks = kKeys * kChunks;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      T* target = tile(stage, which);
      // That of all pages is worked out for each tile: there is no register to keep it in.
      const char* const base = kPaged ? base_of(which) : cache_[which];
#pragma unroll
      for (int i = 0; i < (kTileChunks - 1) / kAttentionThreads + 1; ++i) {
        const int32_t c = thread_ + i * kAttentionThreads;
        if (kTileChunks % kAttentionThreads != 0 && c >= kTileChunks) break;
        const int32_t key = c / kChunks, chunk = c % kChunks;
        const bool valid = first + key >= keys.begin && first + key < keys.end;
        auto k = static_cast<uint32_t>(valid ? first + key : keys.begin);
        const char* cache = base;
        if constexpr (kPaged) {
          // What the table needs has no registers between two copies.
          AttentionRow row{};
          row.index = static_cast<int32_t>(load_16(parked()).y);
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
  __device__ __forceinline__ void add_tile(const TileKeys& keys, int32_t first, int stage) {
    float scores[kKeyTiles][4] = {};
    score(scores, tile(stage, 0));
    const bool at_border = first < keys.full_begin || first + kKeys > keys.full_end;
    this->finish_scores(keys, first, at_border, scores);
    float factor[2];
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
    if constexpr (kPaged) hide(kv_head);
    const void* cache = which ? a_.p.value_cache : a_.p.key_cache;
    const CacheStrides& s = which ? a_.p.value_cache_strides : a_.p.key_cache_strides;
    return reinterpret_cast<const char*>(row_base<T>(row_, kPaged, kv_head, cache, s));
  }
  __device__ __forceinline__ const unsigned char* parked() const {
    return reinterpret_cast<const unsigned char*>(shared_) + kParked + 16 * thread_;
  }
  // Of this warp.
  __device__ __forceinline__ T* shared_queries() const {
    return shared_ + kCacheElements + thread_ / 32 * 16 * kQueryPitch;
  }
  __device__ __forceinline__ T* tile(int stage, int which) const {
    return shared_ + (2 * stage + which) * kKeys * kPitch;
  }

  __device__ __forceinline__ void score(float (&scores)[kKeyTiles][4], const T* keys) const {
    // Rows that this lane names for ldmatrix: 16 keys, two halves of 16 dims.
    const T* row = keys + (lane_ / 16 * 8 + lane_ % 8) * kPitch + lane_ / 8 % 2 * 8;
#pragma unroll
    for (int r = 0; r < kHeadDim / 16; ++r) {
      uint32_t query[4];
      if (r < kRegisterProducts) {
#pragma unroll
        for (int i = 0; i < 4; ++i) query[i] = query_[r][i];
      } else {
        load_matrix(query, shared_queries() + lane_ % 16 * kQueryPitch + lane_ / 16 * 8 +
                               16 * (r - kRegisterProducts));
      }
#pragma unroll
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        load_matrix(b, row + 8 * n * kPitch + 16 * r);
        multiply_16<T>(scores[n], query, {b[0], b[1]});
        multiply_16<T>(scores[n + 1], query, {b[2], b[3]});
      }
    }
  }

  // Whether a tile of values has neither NaN nor infinity.
  __device__ __forceinline__ bool all_finite(const T* values) const {
    constexpr int kGroups = kKeyTiles * (kHeadDim / 8);
    uint32_t found = 0;
    // Eight lanes take the same chunk of eight rows, which lie in different banks.
#pragma unroll 2
    for (int32_t group = lane_ / 8; group < kGroups; group += 4) {
      const int32_t key = group % kKeyTiles * 8 + lane_ % 8, chunk = group / kKeyTiles;
      const uint4 x = load_16(values + key * kPitch + 8 * chunk);
      found |= non_finite<T>(x.x) | non_finite<T>(x.y) | non_finite<T>(x.z) | non_finite<T>(x.w);
    }
    return !__any_sync(~0u, found != 0);
  }

  __device__ __forceinline__ void weigh(const float (&scores)[kKeyTiles][4], const T* values) {
    weigh_with(scores, values, [](uint32_t bits) { return bits; });
  }

  // The same where 0 times a hidden value may be NaN: finite values first, then each of the others
  // only for the vectors that see it.
  __device__ __forceinline__ void weigh_apart(int32_t first, const float (&scores)[kKeyTiles][4],
                                              const T* values) {
    // Bit 2 n + c: whether the probability of key 8 n + 2 t + c is more than 0 in the products.
    uint32_t weighs[2] = {};
    KeyRange range[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      range[i] = row_.visible(a_, this->owner_of(first_ + 8 * i).token);
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          weighs[i] |= scores[n][2 * i + c] > kVanishing<T> ? 1u << (2 * n + c) : 0u;
        }
      }
    }
    weigh_with(scores, values, [](uint32_t bits) {
      // A sign that stands for an element that is not finite, as ones in all of its bits.
      return bits & ~((non_finite<T>(bits) >> 15) * 0xffff);
    });
#pragma unroll 1
    for (int32_t key = 0; key < kKeys; ++key) {
      bool sees[2];
      float weight[2];  // 1, or what 0 makes of a value that is not finite
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sees[i] = first + key >= range[i].begin && first + key < range[i].end;
        const uint32_t of_key = __shfl_sync(~0u, weighs[i], (lane_ & ~3) + key % 8 / 2);
        weight[i] = of_key >> (key / 8 * 2 + key % 2) & 1 ? 1.0f : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        const uint32_t pair =
            *reinterpret_cast<const uint32_t*>(values + key * kPitch + 8 * n + 2 * t_);
        const float2 x = unpack<T>(pair);
        const uint32_t found = non_finite<T>(pair);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (sees[i] && (found & 0x8000)) out[n][2 * i] += weight[i] * x.x;
          if (sees[i] && (found >> 31)) out[n][2 * i + 1] += weight[i] * x.y;
        }
      }
    }
  }

  // operand(bits of two keys' values of a dim) goes into the products.
  template <typename Operand>
  __device__ __forceinline__ void weigh_with(const float (&scores)[kKeyTiles][4], const T* values,
                                             Operand&& operand) {
    const T* row = values + (lane_ / 8 % 2 * 8 + lane_ % 8) * kPitch + lane_ / 16 * 8;
#pragma unroll
    for (int k = 0; k < kKeyTiles; k += 2) {
      const uint32_t p[4] = {
          pack<T>(scores[k][0], scores[k][1]), pack<T>(scores[k][2], scores[k][3]),
          pack<T>(scores[k + 1][0], scores[k + 1][1]), pack<T>(scores[k + 1][2], scores[k + 1][3])};
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        load_matrix_transposed(b, row + 8 * k * kPitch + 8 * n);
        multiply_16<T>(out[n], p, {operand(b[0]), operand(b[1])});
        multiply_16<T>(out[n + 1], p, {operand(b[2]), operand(b[3])});
      }
    }
  }
};

}  // namespace baton::cuda
