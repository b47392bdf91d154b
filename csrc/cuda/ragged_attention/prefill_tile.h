// What a block of ragged_attention's prefill kernel does with one tile of query vectors: copies
// keys and values, scores and weighs them, and keeps the totals of segments. prefill.h tells how
// the work is divided.
#pragma once

#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/pages.h"
#include "cuda/ragged_attention/prefill_sizes.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

template <typename T, int kHeadDim, bool kPaged>
class PrefillBlock {
 public:
  static constexpr int kKeys = prefill_keys(kHeadDim), kPitch = prefill_pitch(kHeadDim);
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;
  static constexpr bool kSegments = prefill_has_segments(kHeadDim);
  static constexpr std::size_t kParked = prefill_parked(kHeadDim);

 private:
  const AttentionArgs& a_;
  const AttentionRow& row_;
  const int32_t thread_, lane_ = thread_ % 32, t_ = lane_ % 4, kv_head_ = blockIdx.y;
  const char* cache_[2];
  uint32_t stride_[2];  // bytes
  T* shared_;           // [stage][keys, values][kKeys][kPitch]
  int32_t first_;       // vector of this lane; the other one is 8 further
  static constexpr int kRegisterProducts = prefill_register_dims(kHeadDim) / 16;
  static constexpr int kCacheElements = prefill_cache_elements(kHeadDim);
  static constexpr int kQueryPitch = prefill_query_pitch(kHeadDim);
  uint32_t query_[kRegisterProducts][4];
  float maximum_[2];

 public:
  float sum[2];  // of this lane's keys
  float out[kDimTiles][4];

  __device__ __forceinline__ PrefillBlock(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t thread, int32_t first_vector, T* shared)
      : a_(a), row_(row), thread_(thread), shared_(shared), first_(first_vector + lane_ / 4) {
    const auto set = [&](int i, const void* cache, const CacheStrides& s) {
      cache_[i] = reinterpret_cast<const char*>(row_base<T>(row, kPaged, kv_head_, cache, s));
    };
    set(0, a.p.key_cache, a.p.key_cache_strides);
    set(1, a.p.value_cache, a.p.value_cache_strides);
    stride_[0] = static_cast<uint32_t>(a.key_column_bytes);
    stride_[1] = static_cast<uint32_t>(a.value_column_bytes);
    clear_sums();
  }

  // Of vectors past the end: zeros.
  __device__ __forceinline__ void load_queries() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = first_ + 8 * i < row_.vectors;
      const Owner owner = owner_of(first_ + 8 * i);
      const TokenStrides& s = a_.p.query_strides;
      const T* query = static_cast<const T*>(a_.p.query) +
                       (int64_t{row_.first_token} + owner.token) * s.token_stride +
                       owner.head * s.head_stride + 2 * t_;
#pragma unroll
      for (int r = 0; r < kHeadDim / 16; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t pair =
              exists ? *reinterpret_cast<const uint32_t*>(query + 16 * r + 8 * half) : 0;
          if (r < kRegisterProducts) {
            query_[r][2 * half + i] = pair;
          } else {
            T* target = shared_queries() + (lane_ / 4 + 8 * i) * kQueryPitch +
                        16 * (r - kRegisterProducts) + 8 * half + 2 * t_;
            *reinterpret_cast<uint32_t*>(target) = pair;
          }
        }
      }
    }
    // A warp reads its own queries alone.
    if constexpr (kQueryPitch > 0) __syncwarp();
  }

  // Asks for the keys and values of one tile; zeros for those that nobody sees.
  __device__ __forceinline__ void copy_tile(const TileKeys& keys, int32_t first, int stage) {
    constexpr int kChunks = kHeadDim / 8;
    constexpr int kTileChunks = kKeys * kChunks;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      T* target = tile(stage, which);
#pragma unroll
      for (int i = 0; i < (kTileChunks - 1) / kAttentionThreads + 1; ++i) {
        const int32_t c = thread_ + i * kAttentionThreads;
        if (kTileChunks % kAttentionThreads != 0 && c >= kTileChunks) break;
        const int32_t key = c / kChunks, chunk = c % kChunks;
        const bool valid = first + key >= keys.begin && first + key < keys.end;
        auto k = static_cast<uint32_t>(valid ? first + key : keys.begin);
        const char* cache = cache_[which];
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
    finish_scores(keys, first, at_border, scores);
    update(scores);
    if (at_border && !all_finite(tile(stage, 1))) {
      weigh_apart(first, scores, tile(stage, 1));
    } else {
      weigh(scores, tile(stage, 1));
    }
  }

  // Adds what the segment has given to the totals, if there are any, and begins one from nothing.
  __device__ __forceinline__ void begin_segment(bool has_totals) {
    add_up();
    float4* totals = this->totals();
    const Joint joint[2] = {join(0, has_totals), join(1, has_totals)};
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      totals += kAttentionThreads;
      const float4 x = has_totals ? as_floats(load_16(totals)) : float4{};
      store_16(totals, float4{joint[0].sum(x.x, out[n][0]), joint[0].sum(x.y, out[n][1]),
                              joint[1].sum(x.z, out[n][2]), joint[1].sum(x.w, out[n][3])});
      // Left alone, ptxas asks for all of them first, which registers have no room for.
      __syncwarp();
    }
    store_16(this->totals(), float4{maximum_[0], sum[0], maximum_[1], sum[1]});
    clear_sums();
  }

  // The sums of all segments.
  __device__ __forceinline__ void end_segments(bool has_totals) {
    add_up();
    if (!has_totals) return;
    const float4* totals = this->totals();
    const Joint joint[2] = {join(0, true), join(1, true)};
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      totals += kAttentionThreads;
      const float4 x = as_floats(load_16(totals));
      out[n][0] = joint[0].sum(x.x, out[n][0]);
      out[n][1] = joint[0].sum(x.y, out[n][1]);
      out[n][2] = joint[1].sum(x.z, out[n][2]);
      out[n][3] = joint[1].sum(x.w, out[n][3]);
      __syncwarp();
    }
  }

  __device__ __forceinline__ void write(int32_t row_index, int32_t split, int32_t splits) const {
    // Read and worked out again, not kept from where the queries were loaded.
    AttentionRow row;
    row.load(a_, row_index);
    int32_t first = first_;
    hide(first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int32_t vector = first + 8 * i;
      if (vector >= row.vectors) continue;
      const Owner owner = owner_of(vector);
      VectorWriter<T> writer(a_, row, vector, owner.token, owner.head, kv_head_, split, splits,
                             maximum_[i], sum[i], t_ == 0);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        writer.put_2(8 * n + 2 * t_, out[n][2 * i], out[n][2 * i + 1]);
      }
    }
  }

 private:
  // The sums of all lanes' keys.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
      }
    }
  }

  // Maximum and sum of a vector joined by those of the totals.
  __device__ __forceinline__ Joint join(int i, bool has_totals) {
    const float2 stats =
        has_totals ? reinterpret_cast<const float2*>(totals())[i] : float2{kNoScore, 0.0f};
    const Joint joint(stats.x, maximum_[i]);
    maximum_[i] = joint.top;
    sum[i] = joint.sum(stats.y, sum[i]);
    return joint;
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      maximum_[i] = kNoScore;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; i += 2) clear(out[n][i], out[n][i + 1]);
    }
  }

  // This thread's part of the totals, which are scarcely ever looked at: [maxima and sums, then
  // sums of values][thread]. Registers have no room for them, nor has shared memory on every
  // architecture.
  __device__ __forceinline__ float4* totals() const {
    const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    return reinterpret_cast<float4*>(a_.totals) + block * (kDimTiles + 1) * kAttentionThreads +
           thread_;
  }

  // Token and head of a vector; worked out when needed, for registers are scarce.
  struct Owner {
    int32_t token, head;
  };
  __device__ __forceinline__ Owner owner_of(int32_t vector) const {
    vector = min(vector, row_.vectors - 1);
    // The reciprocal that divides by it is not kept either.
    int32_t group = a_.group;
    hide(group);
    const int32_t token = vector / group;
    return {token, kv_head_ * group + vector - token * group};
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

  __device__ __forceinline__ void finish_scores(const TileKeys& keys, int32_t first, bool at_border,
                                                float (&scores)[kKeyTiles][4]) const {
    if (!a_.plain_scores) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Owner owner = owner_of(first_ + 8 * i);
        const float slope = slope_of(a_, owner.head);
        const int32_t distance = row_.position(owner.token) - first - 2 * t_;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = scores[n][2 * i + c];
            x = finish_score<true>(a_, x, slope, distance - 8 * n - c);
          }
        }
      }
    } else {
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= a_.score_scale;
      }
    }
    if (!at_border) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const KeyRange range = row_.visible(a_, owner_of(first_ + 8 * i).token);
      const int32_t begin = range.begin - first - 2 * t_;
      const int32_t end = min(range.end, keys.end) - first - 2 * t_;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int32_t k = 8 * n + c;
          if (k < begin || k >= end) scores[n][2 * i + c] = -INFINITY;
        }
      }
    }
  }

  // Scores to probabilities, relative to the running maximum.
  __device__ __forceinline__ void update(float (&scores)[kKeyTiles][4]) {
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float next = maximum_[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        next = fmaxf(next, fmaxf(scores[n][2 * i], scores[n][2 * i + 1]));
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        next = fmaxf(next, __shfl_xor_sync(~0u, next, offset));
      }
      factor[i] = exp2_fast(maximum_[i] - next);
      maximum_[i] = next;
      sum[i] *= factor[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores[n][2 * i + c];
          x = exp2_fast(x - next);
          sum[i] += x;
        }
      }
    }
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
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
  // for those vectors alone that see it.
  __device__ __forceinline__ void weigh_apart(int32_t first, const float (&scores)[kKeyTiles][4],
                                              const T* values) {
    // Bit 2 n + c: whether the probability of key 8 n + 2 t + c is more than 0 in the products.
    uint32_t weighs[2] = {};
    KeyRange range[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      range[i] = row_.visible(a_, owner_of(first_ + 8 * i).token);
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
