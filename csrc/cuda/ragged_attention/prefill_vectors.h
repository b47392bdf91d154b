// The query vectors of one thread of ragged_attention's prefill kernels: their scores, maxima and
// sums, the totals of segments, and their results. Both kernels, that of m16n8k16 products and that
// of warpgroup products, have this part, since their fragments lie in the same registers.
//
// A warp has 16 vectors. With g = lane / 4 and t = lane % 4 a lane has vectors g and g + 8: of a
// tile of columns, keys 8 n + 2 t and the next one; of the sums, dims 8 n + 2 t and the next one.
#pragma once

#include "cuda/ragged_attention/launch.h"
#include "cuda/ragged_attention/mma.h"
#include "cuda/ragged_attention/pages.h"
#include "cuda/ragged_attention/results.h"

namespace baton::cuda {

// Tiles of kKeys columns; kThreads of a block have vectors.
template <typename T, int kHeadDim, int kTileKeys, int kThreads>
class PrefillVectors {
 public:
  static constexpr int kKeys = kTileKeys;
  static constexpr int kKeyTiles = kKeys / 8, kDimTiles = kHeadDim / 8;

 protected:
  const AttentionArgs& a_;
  const AttentionRow& row_;
  const int32_t thread_, lane_ = thread_ % 32, t_ = lane_ % 4, kv_head_ = blockIdx.y;
  int32_t first_;  // vector of this lane; the other one is 8 further
  float maximum_[2];

 public:
  float sum[2];  // of this lane's keys
  float out[kDimTiles][4];

  __device__ __forceinline__ PrefillVectors(const AttentionArgs& a, const AttentionRow& row,
                                            int32_t thread, int32_t first_vector)
      : a_(a), row_(row), thread_(thread), first_(first_vector + lane_ / 4) {
    clear_sums();
  }

  // Adds what the segment has given to the totals, if there are any, and begins one from nothing.
  __device__ __forceinline__ void begin_segment(bool has_totals) {
    add_up();
    float4* totals = this->totals();
    const Joint joint[2] = {join(0, has_totals), join(1, has_totals)};
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      totals += kThreads;
      const float4 x = has_totals ? as_floats(load_16(totals)) : float4{};
      store_16(totals, float4{joint[0].sum(x.x, out[n][0]), joint[0].sum(x.y, out[n][1]),
                              joint[1].sum(x.z, out[n][2]), joint[1].sum(x.w, out[n][3])});
      // Otherwise ptxas loads all of them first, for which there are not enough registers.
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
      totals += kThreads;
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

 protected:
  // put(product, half, which of the two vectors, two dims of a query); zeros past the last vector.
  template <typename Put>
  __device__ __forceinline__ void load_query_pairs(Put&& put) const {
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
          put(r, half, i,
              exists ? *reinterpret_cast<const uint32_t*>(query + 16 * r + 8 * half) : 0);
        }
      }
    }
  }

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
    return reinterpret_cast<float4*>(a_.totals) + block * (kDimTiles + 1) * kThreads + thread_;
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
          // Otherwise ptxas keeps the old scores along with the new ones.
          if constexpr (kKeys > 64) __syncwarp();
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

  // Scores to probabilities, relative to the running maximum. What the sums of values have to be
  // multiplied by.
  __device__ __forceinline__ void weigh_scores(float (&scores)[kKeyTiles][4], float (&factor)[2]) {
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
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[n][i] *= factor[i / 2];
      }
    }
  }
};

}  // namespace baton::cuda
