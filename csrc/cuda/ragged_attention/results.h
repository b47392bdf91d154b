// Shared by the kernels of ragged_attention: scores, and how sums become a result.
#pragma once

#include "cuda/ragged_attention/rows.h"

namespace baton::cuda {

// Base 2 score of a vector and a key, from their product. Fast: the error of tanh is small compared
// with the bound, though not with tanh itself; enough for scores of 16-bit elements.
template <bool kFast>
__device__ __forceinline__ float finish_score(const AttentionArgs& a, float product, float slope,
                                              int32_t distance) {
  float x = __fmul_rn(product, a.score_scale);
  if (a.p.softcap > 0.0f) {
    const float y = product * a.tanh_scale;
    if constexpr (kFast) {
      constexpr float kLog2e = 1.4426950408889634f;
      x = __fmul_rn(a.tanh_bound,
                    1.0f - 2.0f * reciprocal_fast(1.0f + exp2_fast(2.0f * kLog2e * y)));
    } else {
      x = __fmul_rn(a.tanh_bound, tanhf(y));
    }
  }
  // Written as fmaf, so that all kernels round alike. A key after the token is as far away as one
  // that lies before it by the same distance.
  return fmaf(-slope, fabsf(static_cast<float>(distance)), x);
}

__device__ __forceinline__ float slope_of(const AttentionArgs& a, int32_t head) {
  return a.p.alibi_slopes ? a.p.alibi_slopes[head] * a.slope_scale : 0.0f;
}

// 2^(x - top), and 0 for x = -inf, since -inf - -inf would be NaN.
__device__ __forceinline__ float weight_of(float x, float top) {
  return x == -INFINITY ? 0.0f : exp2f(x - top);
}

// Joins a vector's results for two sets of keys: their maximum, and the factors of their sums.
struct Joint {
  float top, before, now;

  __device__ __forceinline__ Joint(float maximum_before, float maximum_now)
      : top(fmaxf(maximum_before, maximum_now)),
        before(weight_of(maximum_before, top)),
        now(weight_of(maximum_now, top)) {}
  // Written as fmaf, so that all kernels round alike.
  __device__ __forceinline__ float sum(float sum_before, float sum_now) const {
    return fmaf(sum_before, before, __fmul_rn(sum_now, now));
  }
};

__device__ __forceinline__ uint4 as_bits(float a, float b, float c, float d) {
  return {__float_as_uint(a), __float_as_uint(b), __float_as_uint(c), __float_as_uint(d)};
}
__device__ __forceinline__ float4 as_floats(uint4 x) {
  return {__uint_as_float(x.x), __uint_as_float(x.y), __uint_as_float(x.z), __uint_as_float(x.w)};
}

// Four consecutive dims in one instruction.
template <typename T>
__device__ __forceinline__ void store_4(T* address, float a, float b, float c, float d) {
  if constexpr (sizeof(T) == 4) {
    store_16(address, as_bits(a, b, c, d));
  } else {
    store_8(address, uint2{pack<T>(a, b), pack<T>(c, d)});
  }
}

// Turns a vector's sums into its result. The sink joins the denominator.
struct Finished {
  float top, total;  // of the denominator
  float factor;      // of the sum of values
};
// `sees`: whether the vector sees a key.
__device__ __forceinline__ Finished finish_vector(const AttentionArgs& a, int32_t head, bool sees,
                                                  float maximum, float sum) {
  Finished f{maximum, sum, 1.0f};
  const float sink = a.p.sinks ? a.p.sinks[head] : -INFINITY;
  // A sink of -inf means no sink.
  if (sink != -INFINITY) {
    const float x = static_cast<float>(sink * a.inverse_unit);
    f.top = fmaxf(maximum, x);
    f.factor = weight_of(maximum, f.top);
    f.total = fmaf(sum, f.factor, exp2f(x - f.top));
  }
  // If all scores are -inf the result is NaN, as with torch.softmax.
  f.factor = sees ? f.factor / f.total : 0.0f;
  return f;
}
__device__ __forceinline__ float finish_lse(const AttentionArgs& a, int32_t head, float sum,
                                            const Finished& f) {
  // Without keys lse is the sink, bit by bit.
  if (sum == 0.0f) return a.p.sinks ? a.p.sinks[head] : -INFINITY;
  return static_cast<float>(f.top * a.log_unit + static_cast<double>(logf(f.total)));
}

// An element of the result. Adding zero turns -0 into 0, which a sum that joins nothing gives.
__device__ __forceinline__ float finish_element(float sum, float factor) {
  return fmaf(sum, factor, 0.0f);
}

// Writes a vector's result, or its partial result when the row is split. `first` is true for
// one of the lanes that share a vector.
template <typename T>
class VectorWriter {
  float factor_ = 1.0f;
  float* sums_ = nullptr;
  T* out_ = nullptr;

  __device__ __forceinline__ float finished(float sum) const {
    return finish_element(sum, factor_);
  }

 public:
  __device__ __forceinline__ VectorWriter(const AttentionArgs& a, const AttentionRow& row,
                                          int32_t vector, int32_t token, int32_t head,
                                          int32_t kv_head, int32_t split, int32_t splits,
                                          float maximum, float sum, bool first) {
    if (splits > 1) {
      const int64_t index = partial_index(a, row, vector, kv_head, split);
      sums_ = a.partial_sums + index * a.p.sizes.head_dim;
      if (first) {
        store_8(a.partial_stats + 2 * index, uint2{__float_as_uint(maximum), __float_as_uint(sum)});
      }
      return;
    }
    const Finished finished = finish_vector(a, head, row.position(token) >= 0, maximum, sum);
    factor_ = finished.factor;
    const int64_t index = result_index(a, row, token, head);
    out_ = static_cast<T*>(a.p.out) + index * a.p.sizes.head_dim;
    if (first && a.p.lse) a.p.lse[index] = finish_lse(a, head, sum, finished);
  }
  // Four consecutive dims.
  __device__ __forceinline__ void put_4(int32_t dim, float a, float b, float c, float d) const {
    if (sums_) {
      store_16(sums_ + dim, as_bits(a, b, c, d));
    } else {
      store_4(out_ + dim, finished(a), finished(b), finished(c), finished(d));
    }
  }
  // Eight consecutive dims of 16-bit elements.
  __device__ __forceinline__ void put_8(int32_t dim, float4 x, float4 y) const {
    if (sums_) {
      store_16(sums_ + dim, x);
      store_16(sums_ + dim + 4, y);
    } else {
      store_16(out_ + dim,
               uint4{pack<T>(finished(x.x), finished(x.y)), pack<T>(finished(x.z), finished(x.w)),
                     pack<T>(finished(y.x), finished(y.y)), pack<T>(finished(y.z), finished(y.w))});
    }
  }
  // Two consecutive dims of 16-bit elements.
  __device__ __forceinline__ void put_2(int32_t dim, float a, float b) const {
    if (sums_) {
      store_8(sums_ + dim, uint2{__float_as_uint(a), __float_as_uint(b)});
    } else {
      *reinterpret_cast<uint32_t*>(out_ + dim) = pack<T>(finished(a), finished(b));
    }
  }
};

}  // namespace baton::cuda
