// One warp of ragged_attention's decode kernel: its 16 keys at a time, in registers from global
// memory to the sums. decode.h tells how they lie.
#pragma once

#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/pages.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

// How far, in base 2, a score may be above what probabilities are relative to.
constexpr float kSlack = 8.0f;

// A row of 256 dims leaves no registers for the queries: they are read from shared memory, 16 bytes
// per lane and two products.
constexpr bool decode_queries_in_shared(int head_dim) { return head_dim > 128; }

// fn.operator()<0>() to fn.operator()<kCount - 1>(): a loop whose counter is a constant.
template <int kCount, int kFirst = 0, typename Fn>
__device__ __forceinline__ void unroll(Fn&& fn) {
  if constexpr (kFirst < kCount) {
    fn.template operator()<kFirst>();
    unroll<kCount, kFirst + 1>(fn);
  }
}

template <typename T, int kHeadDim, int kTiles, bool kPaged>
class DecodeWarp {
  static constexpr int kProducts = kHeadDim / 16;  // of each kind per step
  static constexpr bool kQueriesInShared = decode_queries_in_shared(kHeadDim);

  const AttentionArgs& a_;
  const AttentionRow& row_;
  const TileKeys& keys_;
  const int32_t lane_ = threadIdx.x % 32, g_ = lane_ / 4, t_ = lane_ % 4, kv_head_ = blockIdx.y;
  const char* key_base_;
  const char* value_base_;
  // With a block table, pages are looked up per step or per key. If per step, to_page_ of lane i is
  // the distance from the page of step i - 1 to that of step i, in units of 16 bytes.
  const bool by_step_, by_key_;
  int32_t to_page_, step_ = 0;
  uint32_t key_[2][kHeadDim / 8];
  uint32_t value_[4][kHeadDim / 16];
  uint32_t query_[kTiles][kQueriesInShared ? 4 : kHeadDim / 8];
  const uint4* shared_queries_ = nullptr;

 public:
  // Probabilities of vectors 2 t and 2 t + 1 are relative to these, which are near the maximum.
  float maximum[kTiles][2];
  float sum[kTiles][2] = {};  // of this lane's keys
  float out[kTiles][kProducts][4];

  __device__ __forceinline__ DecodeWarp(const AttentionArgs& a, const AttentionRow& row,
                                        const TileKeys& keys)
      : a_(a),
        row_(row),
        keys_(keys),
        by_step_(kPaged && a.pages_of_steps && (row.start + keys.begin) % kStepKeys == 0 &&
                 keys.end - keys.begin <= 32 * kStride),
        by_key_(kPaged && !by_step_) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) maximum[n][0] = maximum[n][1] = kNoScore;
    const auto base = [&](const void* cache, const CacheStrides& s) {
      return reinterpret_cast<const char*>(row_base<T>(row, kPaged, kv_head_, cache, s));
    };
    key_base_ = base(a.p.key_cache, a.p.key_cache_strides) + 16 * t_;
    value_base_ = base(a.p.value_cache, a.p.value_cache_strides) + 16 * g_;
    if (by_step_) look_up_steps(keys.begin + static_cast<int32_t>(threadIdx.x) / 32 * kStepKeys);
  }

  // One multiplication of 32 bits by 32 bits, which adds 64.
  static __device__ __forceinline__ const T* at(const char* base, int32_t key, int32_t bytes) {
    return reinterpret_cast<const T*>(base + uint64_t{static_cast<uint32_t>(key)} *
                                                 static_cast<uint32_t>(bytes));
  }

  // Rows of K as of Q: 16 bytes of every 64, then 8 of the last 32.
  static __device__ __forceinline__ void load_row(uint32_t (&x)[kHeadDim / 8], const T* row,
                                                  int32_t t) {
    unroll<kHeadDim / 32>([&]<int j>() { put(x, 4 * j, load_16_once<64 * j>(row)); });
    if constexpr (kHeadDim % 32 == 16)
      put(x, kHeadDim / 8 - 2, load_8_once(row + kHeadDim - 16 - 4 * t));
  }

  // A step begins here: from here on the bases are those of its page.
  __device__ __forceinline__ void load_keys(int32_t first) {
    if (by_key_) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const PagePlace place = place_of(a_, row_, existing_key(first + g_ + 8 * i));
        const char* page = page_of(key_base_, place, a_.p.key_cache_strides);
        load_row(key_[i], at(page, place.column, a_.key_column_bytes), t_);
      }
      return;
    }
    if (by_step_) go_to_next_page();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_row(key_[i], at(key_base_, existing_key(first + g_ + 8 * i), a_.key_column_bytes), t_);
    }
  }

  __device__ __forceinline__ void load_values(int32_t first) {
    const auto key_of = [&](int i) { return existing_key(first + 2 * t_ + i % 2 + i / 2 * 8); };
    if (by_key_) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const PagePlace place = place_of(a_, row_, key_of(i));
        const char* page = page_of(value_base_, place, a_.p.value_cache_strides);
        load_value(i, at(page, place.column, a_.value_column_bytes));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) load_value(i, at(value_base_, key_of(i), a_.value_column_bytes));
  }

  __device__ __forceinline__ int32_t head_of(int32_t vector) const {
    return kv_head_ * a_.group + vector;
  }

  // Columns without a vector repeat the last one; their sums are not used.
  __device__ __forceinline__ int32_t existing(int32_t vector) const {
    return min(vector, row_.vectors - 1);
  }

  // Each warp reads a part for all warps: [16 bytes of every lane's row][lane], then the 8 bytes of
  // the last 16 dims.
  __device__ __forceinline__ void load_queries(uint4* shared) {
    constexpr int kWhole = kHeadDim / 32, kParts = kWhole + kHeadDim % 32 / 16;
    const auto rest = [&](int n) {
      return reinterpret_cast<uint2*>(shared + 32 * kTiles * kWhole) + 32 * n + lane_;
    };
    for (int part = threadIdx.x / 32; part < kTiles * kParts; part += kAttentionWarps) {
      const int n = part / kParts, j = part % kParts;
      const T* query = static_cast<const T*>(a_.p.query) +
                       int64_t{row_.first_token} * a_.p.query_strides.token_stride +
                       head_of(existing(g_ + 8 * n)) * a_.p.query_strides.head_stride;
      if (j < kWhole) {
        store_16(shared + 32 * (kWhole * n + j) + lane_, load_16_once(query + 8 * t_ + 32 * j));
      } else {
        store_8(rest(n), load_8_once(query + 4 * t_ + 32 * j));
      }
    }
    __syncthreads();
    if constexpr (kQueriesInShared) {
      static_assert(kTiles == 1);
      shared_queries_ = shared + lane_;
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int j = 0; j < kWhole; ++j) {
          put(query_[n], 4 * j, load_16(shared + 32 * (kWhole * n + j) + lane_));
        }
        if constexpr (kParts > kWhole) put(query_[n], 4 * kWhole, load_8(rest(n)));
      }
    }
  }

  // Streams the keys of this warp, the first of which have been requested.
  __device__ __forceinline__ void run(int32_t begin) {
    int32_t first = begin;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int r = 0; r < kProducts; ++r) {
        clear(out[n][r][0], out[n][r][1]);
        clear(out[n][r][2], out[n][r][3]);
      }
    }
    while (true) {
      // The keys were requested in the middle of the previous turn; the values' registers are
      // free now. Without the __syncwarp, over which ptxas moves no load, it waits for the keys
      // first and requests both afterwards.
      load_values(first);
      __syncwarp();
      const int32_t next = first + kAttentionWarps * kStepKeys;
      float scores[kTiles][4] = {};
      score(scores);
      __syncwarp();
      if (next < keys_.end) load_keys(next);
      finish_scores(first, scores);
      uint32_t probabilities[kTiles][2];
      update(first == begin, scores, probabilities);
      weigh(probabilities);
      if (next >= keys_.end) break;
      first = next;
    }
  }

  // The sums of all lanes' keys.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum[n][c] += shuffle_xor<4>(sum[n][c]);
        sum[n][c] += shuffle_xor<8>(sum[n][c]);
        sum[n][c] += shuffle_xor<16>(sum[n][c]);
      }
    }
  }

 private:
  static constexpr int32_t kStride = kAttentionWarps * kStepKeys;

  // Past the end this is the last key; its score is discarded.
  __device__ __forceinline__ int32_t existing_key(int32_t key) const {
    return min(key, keys_.end - 1);
  }

  static __device__ __forceinline__ const char* page_of(const char* base, PagePlace place,
                                                        const CacheStrides& s) {
    return base + place.page * s.slot_stride * int64_t{sizeof(T)};
  }

  // Looks up all steps of this warp at once, so that no load of keys waits for the table.
  __device__ __forceinline__ void look_up_steps(int32_t first) {
    if (first >= keys_.end) return;
    // Distances are in units of 16 bytes; lanes without a step repeat the last one.
    const auto page_at = [&](int32_t key) {
      const PagePlace place = place_of(a_, row_, key);
      const CacheStrides& s = a_.p.key_cache_strides;
      const int64_t elements = place.page * s.slot_stride + (place.column - key) * s.column_stride;
      return static_cast<int32_t>(elements / (16 / int64_t{sizeof(T)}));
    };
    const int32_t step = min(lane_, (keys_.end - 1 - first) / kStride);
    const int32_t key = first + step * kStride;
    to_page_ = page_at(key);
    if (step > 0) to_page_ -= page_at(key - kStride);
  }

  __device__ __forceinline__ void go_to_next_page() {
    const int64_t bytes = int64_t{__shfl_sync(~0u, to_page_, step_++)} * 16;
    key_base_ += bytes;
    value_base_ += bytes;
  }

  __device__ __forceinline__ void load_value(int i, const T* row) {
    unroll<kHeadDim / 64>([&]<int j>() { put(value_[i], 4 * j, load_16_once<128 * j>(row)); });
    constexpr int kRest = kHeadDim % 64, kDone = kHeadDim - kRest;
    static_assert(kRest == 0 || kRest == 16 || kRest == 32);
    if constexpr (kRest == 32) put(value_[i], kDone / 16, load_8_once(row + kDone - 4 * g_));
    if constexpr (kRest == 16) value_[i][kDone / 16] = load_4_once(row + kDone - 6 * g_);
  }

  template <int kCount>
  static __device__ __forceinline__ void put(uint32_t (&x)[kCount], int i, uint4 bits) {
    x[i] = bits.x;
    x[i + 1] = bits.y;
    x[i + 2] = bits.z;
    x[i + 3] = bits.w;
  }
  template <int kCount>
  static __device__ __forceinline__ void put(uint32_t (&x)[kCount], int i, uint2 bits) {
    x[i] = bits.x;
    x[i + 1] = bits.y;
  }

  __device__ __forceinline__ void score(float (&scores)[kTiles][4]) {
#pragma unroll
    for (int r = 0; r < kProducts; ++r) {
      if constexpr (kQueriesInShared) {
        if (r % 2 == 0) put(query_[0], 0, load_16(shared_queries_ + 32 * (r / 2)));
      }
      const int q = kQueriesInShared ? r % 2 * 2 : 2 * r;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        multiply_16<T>(scores[n],
                       {key_[0][2 * r], key_[1][2 * r], key_[0][2 * r + 1], key_[1][2 * r + 1]},
                       {query_[n][q], query_[n][q + 1]});
      }
    }
  }

  // Products [keys g, g + 8][vectors 2 t, 2 t + 1] to scores.
  __device__ __forceinline__ void finish_scores(int32_t first, float (&scores)[kTiles][4]) {
    if (!a_.plain_scores) {
      const int32_t distance = row_.length - 1 - first - g_;
      for_each_vector([&](int n, int c, int32_t vector) {
        const float slope = slope_of(a_, head_of(vector));
        scores[n][c] = finish_score<true>(a_, scores[n][c], slope, distance);
        scores[n][c + 2] = finish_score<true>(a_, scores[n][c + 2], slope, distance - 8);
      });
    } else {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores[n][i] *= a_.score_scale;
      }
    }
    // All vectors are of the one token: they see the same keys.
    if (first + kStepKeys > keys_.end) {
      const int32_t left = keys_.end - first - g_;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (left <= i / 2 * 8) scores[n][i] = -INFINITY;
        }
      }
    }
  }

  // Scores to the second product's operand.
  __device__ __forceinline__ void update(bool at_first, float (&scores)[kTiles][4],
                                         uint32_t (&probabilities)[kTiles][2]) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float next[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        next[c] = fmaxf(scores[n][c], scores[n][c + 2]);
        next[c] = fmaxf(next[c], shuffle_xor<4>(next[c]));
        next[c] = fmaxf(next[c], shuffle_xor<8>(next[c]));
        next[c] = fmaxf(next[c], shuffle_xor<16>(next[c]));
      }
      // After the first step, only what has grown by more than 2^8 is worth the multiplications:
      // until then, probabilities exceed one, which costs neither range nor precision.
      if (__any_sync(~0u, next[0] > maximum[n][0] + kSlack || next[1] > maximum[n][1] + kSlack)) {
        float factor[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float top = fmaxf(maximum[n][c], next[c]);
          factor[c] = exp2_fast(maximum[n][c] - top);
          maximum[n][c] = top;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) sum[n][c] *= factor[c];
        if (!at_first) {
#pragma unroll
          for (int r = 0; r < kProducts; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][r][i] *= factor[i % 2];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = exp2_fast(scores[n][i] - maximum[n][i % 2]);
#pragma unroll
      for (int c = 0; c < 2; ++c) sum[n][c] += scores[n][c] + scores[n][c + 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        probabilities[n][i] = transpose_matrix(pack<T>(scores[n][2 * i], scores[n][2 * i + 1]));
      }
    }
  }

  __device__ __forceinline__ void weigh(const uint32_t (&probabilities)[kTiles][2]) {
#pragma unroll
    for (int r = 0; r < kProducts; ++r) {
      const uint32_t values[4] = {__byte_perm(value_[0][r], value_[1][r], 0x5410),
                                  __byte_perm(value_[0][r], value_[1][r], 0x7632),
                                  __byte_perm(value_[2][r], value_[3][r], 0x5410),
                                  __byte_perm(value_[2][r], value_[3][r], 0x7632)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) multiply_16<T>(out[n][r], values, probabilities[n]);
    }
  }

  // fn(tile, which of this lane's columns, vector), for vectors that exist.
  template <typename Fn>
  __device__ __forceinline__ void for_each_vector(Fn&& fn) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int32_t vector = 8 * n + 2 * t_ + c;
        if (vector < row_.vectors) fn(n, c, vector);
      }
    }
  }
};

}  // namespace baton::cuda
