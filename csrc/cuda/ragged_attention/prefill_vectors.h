// The query vectors of one thread of ragged_attention's prefill kernels: their scores, maxima and
// sums, the totals of segments, and their results. Both kernels, that of m16n8k16 products and that
// of warpgroup products, have this part, since their fragments lie in the same registers.
//
// A warp has one or two tiles of 16 vectors. With g = lane / 4 and t = lane % 4 a lane has vectors
// g and g + 8 of each: of a tile of columns, keys 8 n + 2 t and the next one; of the sums, dims
// 8 n + 2 t and the next one.
#pragma once

#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/pages.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

// Tiles of kKeys columns; kThreads of a block have vectors, in kTiles tiles of each warp.
template <typename T, int kHeadDim, int kTileKeys, int kThreads, int kTiles = 1>
class PrefillVectors {
 public:
  static constexpr int kKeys = kTileKeys;
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;
  static constexpr int kVectors = 2 * kTiles;  // of a lane

 protected:
  const AttentionArgs& a_;
  const AttentionRow& row_;
  const int32_t thread_, lane_ = thread_ % 32, t_ = lane_ % 4, kv_head_ = blockIdx.y;
  int32_t first_;  // vector of this lane; the others are 8 further each
  float maximum_[kVectors];

 public:
  float sum[kVectors];  // of this lane's keys
  float out[kTiles][kDimTiles][4];

  __device__ __forceinline__ PrefillVectors(const AttentionArgs& a, const AttentionRow& row,
                                            int32_t thread, int32_t first_vector)
      : a_(a), row_(row), thread_(thread), first_(first_vector + lane_ / 4) {
    clear_sums();
  }

  // Adds what the segment has given to the totals, if there are any, and begins one from nothing.
  __device__ __forceinline__ void begin_segment(bool has_totals) {
    add_up();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float4* totals = this->totals(m);
      const Joint joint[2] = {join(2 * m, has_totals), join(2 * m + 1, has_totals)};
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        totals += kThreads;
        float (&x)[4] = out[m][n];
        const float4 y = has_totals ? as_floats(load_16(totals)) : float4{};
        store_16(totals, float4{joint[0].sum(y.x, x[0]), joint[0].sum(y.y, x[1]),
                                joint[1].sum(y.z, x[2]), joint[1].sum(y.w, x[3])});
        // Otherwise ptxas loads all of them first, for which there are not enough registers.
        __syncwarp();
      }
      store_16(this->totals(m),
               float4{maximum_[2 * m], sum[2 * m], maximum_[2 * m + 1], sum[2 * m + 1]});
    }
    clear_sums();
  }

  // The sums of all segments.
  __device__ __forceinline__ void end_segments(bool has_totals) {
    add_up();
    if (!has_totals) return;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      const float4* totals = this->totals(m);
      const Joint joint[2] = {join(2 * m, true), join(2 * m + 1, true)};
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        totals += kThreads;
        float (&x)[4] = out[m][n];
        const float4 y = as_floats(load_16(totals));
        x[0] = joint[0].sum(y.x, x[0]);
        x[1] = joint[0].sum(y.y, x[1]);
        x[2] = joint[1].sum(y.z, x[2]);
        x[3] = joint[1].sum(y.w, x[3]);
        __syncwarp();
      }
    }
  }

  __device__ __forceinline__ void write(int32_t row_index, int32_t split, int32_t splits) const {
    // Read again instead of being kept since the queries were loaded.
    AttentionRow row;
    row.load(a_, row_index);
    int32_t first = first_, t = lane_again() % 4;
    hide(first);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int32_t vector = first + 8 * i;
      if (vector >= row.vectors) continue;
      const Owner owner = owner_of_existing(vector);
      VectorWriter<T> writer(a_, row, vector, owner.token, owner.head, kv_head_, split, splits,
                             maximum_[i], sum[i], t == 0);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        const float* x = &out[i / 2][n][i % 2 * 2];
        writer.put_2(8 * n + 2 * t, x[0], x[1]);
      }
    }
  }

 protected:
  // Computes lane_ again, so that neither it nor values derived from it occupy registers.
  static __device__ __forceinline__ int32_t lane_again() {
    int32_t thread = threadIdx.x;
    hide(thread);
    return thread % 32;
  }

  // put(product, half, which of the lane's vectors, two dims of a query); zeros past the last
  // vector.
  template <typename Put>
  __device__ __forceinline__ void load_query_pairs(Put&& put) const {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
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
          put(r, half, i,
              exists ? *reinterpret_cast<const uint32_t*>(query + 16 * r + 8 * half) : 0);
        }
      }
    }
  }

  // The sums of all lanes' keys.
  __device__ __forceinline__ void add_up() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        sum[i] += __shfl_xor_sync(~0u, sum[i], offset);
      }
    }
  }

  // Maximum and sum of a vector joined by those of the totals.
  __device__ __forceinline__ Joint join(int i, bool has_totals) {
    const float2 stats =
        has_totals ? reinterpret_cast<const float2*>(totals(i / 2))[i % 2] : float2{kNoScore, 0.0f};
    const Joint joint(stats.x, maximum_[i]);
    maximum_[i] = joint.top;
    sum[i] = joint.sum(stats.y, sum[i]);
    return joint;
  }

  __device__ __forceinline__ void clear_sums() {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      maximum_[i] = kNoScore;
      sum[i] = 0.0f;
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; i += 2) clear(out[m][n][i], out[m][n][i + 1]);
      }
    }
  }

  // This thread's part of the totals, which are scarcely ever looked at: [tile][maxima and sums,
  // then sums of values][thread]. Registers have no room for them, nor has shared memory on every
  // architecture.
  __device__ __forceinline__ float4* totals(int tile) const {
    const int64_t block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
    return reinterpret_cast<float4*>(a_.totals) +
           (block * kTiles + tile) * (kDimTiles + 1) * kThreads + thread_;
  }

  // Token and head of a vector; worked out when needed, for registers are scarce.
  struct Owner {
    int32_t token, head;
  };
  __device__ __forceinline__ Owner owner_of(int32_t vector) const {
    return owner_of_existing(min(vector, row_.vectors - 1));
  }
  __device__ __forceinline__ Owner owner_of_existing(int32_t vector) const {
    // The reciprocal that divides by it is not kept either.
    int32_t group = a_.group;
    hide(group);
    const int32_t token = vector / group;
    return {token, kv_head_ * group + vector - token * group};
  }

  __device__ __forceinline__ void finish_scores(const TileKeys& keys, int32_t first, bool at_border,
                                                float (&scores)[kTiles][kKeyTiles][4]) const {
    if (!a_.plain_scores) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const Owner owner = owner_of(first_ + 8 * i);
        const float slope = slope_of(a_, owner.head);
        const int32_t distance = row_.position(owner.token) - first - 2 * t_;
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            float& x = scores[i / 2][n][i % 2 * 2 + c];
            x = finish_score<true>(a_, x, slope, distance - 8 * n - c);
          }
          // Otherwise ptxas keeps the old scores along with the new ones.
          if constexpr (kKeys > 64) __syncwarp();
        }
      }
    } else {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) scores[m][n][i] *= a_.score_scale;
        }
      }
    }
    if (!at_border) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const KeyRange range = row_.visible(a_, owner_of(first_ + 8 * i).token);
      const int32_t begin = range.begin - first - 2 * t_;
      const int32_t end = min(range.end, keys.end) - first - 2 * t_;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int32_t k = 8 * n + c;
          if (k < begin || k >= end) scores[i / 2][n][i % 2 * 2 + c] = -INFINITY;
        }
      }
    }
  }

  // Turns scores into probabilities relative to the running maximum. `factor`: the sums of values
  // must be multiplied by it.
  __device__ __forceinline__ void weigh_scores(float (&scores)[kTiles][kKeyTiles][4],
                                               float (&factor)[kVectors]) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float next = maximum_[i];
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const float* x = &scores[i / 2][n][i % 2 * 2];
        next = fmaxf(next, fmaxf(x[0], x[1]));
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
          float& x = scores[i / 2][n][i % 2 * 2 + c];
          x = exp2_fast(x - next);
          sum[i] += x;
        }
      }
    }
  }

  // Adds values of a tile that are not finite, only to the vectors that see them: 0 times a hidden
  // one would be NaN. Bit 2 n + c of `weighs` is set if a vector's probability of key 8 n + 2 t + c
  // is more than 0 in the products. values_of(key) points to this lane's dims of the key; it is
  // called if some vector sees the key.
  template <typename ValuesOf>
  __device__ __forceinline__ void add_not_finite(int32_t first, const uint32_t (&weighs)[kVectors],
                                                 ValuesOf&& values_of) {
    KeyRange range[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int32_t vector = first_ + 8 * i;
      range[i] = row_.visible(a_, owner_of(vector).token);
      if (vector >= row_.vectors) range[i].end = 0;
    }
#pragma unroll 1
    for (int32_t key = 0; key < kKeys; ++key) {
      bool sees[kVectors], someone_sees = false;
      float weight[kVectors];  // 1, or 0, which makes NaN of a value that is not finite
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        sees[i] = first + key >= range[i].begin && first + key < range[i].end;
        someone_sees |= sees[i];
        const uint32_t of_key = __shfl_sync(~0u, weighs[i], (lane_ & ~3) + key % 8 / 2);
        weight[i] = of_key >> (key / 8 * 2 + key % 2) & 1 ? 1.0f : 0.0f;
      }
      if (!someone_sees) continue;
      const T* values = values_of(key);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(values + 8 * n);
        const float2 x = unpack<T>(pair);
        const uint32_t found = non_finite<T>(pair);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          float* sums = &out[i / 2][n][i % 2 * 2];
          if (sees[i] && (found & 0x8000)) sums[0] += weight[i] * x.x;
          if (sees[i] && (found >> 31)) sums[1] += weight[i] * x.y;
        }
      }
    }
  }

  __device__ __forceinline__ void rescale(const float (&factor)[kVectors]) {
    bool changed = false;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) changed |= factor[i] != 1.0f;
    if (__any_sync(~0u, changed)) {
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) out[m][n][i] *= factor[2 * m + i / 2];
        }
      }
    }
  }
};

}  // namespace baton::cuda
