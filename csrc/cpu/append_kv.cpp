// append_kv on the CPU: one work item rotates and writes one row's token.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"
#include "cpu/simd/eight_bit.h"

namespace baton::cpu::BATON_ISA {

namespace {

// target = [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2], cos and sin already in float.
template <typename T>
void rotate(T* target, const T* x, const float* cos1, const float* cos2, const float* sin1,
            const float* sin2, int64_t half) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const int64_t n = half - i;
    if (n >= kLanes) {
      const Vec x1 = load(x + i), x2 = load(x + half + i);
      store(target + i, fmadd(x1, load(cos1 + i), -(x2 * load(sin1 + i))));
      store(target + half + i, fmadd(x2, load(cos2 + i), x1 * load(sin2 + i)));
    } else {
      const Vec x1 = load_partial(x + i, n), x2 = load_partial(x + half + i, n);
      store_partial(target + i,
                    fmadd(x1, load_partial(cos1 + i, n), -(x2 * load_partial(sin1 + i, n))), n);
      store_partial(target + half + i,
                    fmadd(x2, load_partial(cos2 + i, n), x1 * load_partial(sin2 + i, n)), n);
    }
  }
}

constexpr int64_t kMaxHeadDim = 256;

// Cache is T, or Int8 or Float8 with scales.
template <typename T, typename Rotary, typename Cache>
void append_row(const AppendKvParams& p, int64_t row) {
  const int64_t dim = p.sizes.head_dim, half = dim / 2;
  const int64_t slot = p.slots[row], column = p.columns[row];
  const bool rotates = p.cos != nullptr;

  float cos[kMaxHeadDim], sin[kMaxHeadDim];
  if (rotates) {
    const Rotary* cos_row = static_cast<const Rotary*>(p.cos) + row * p.cos_row_stride;
    const Rotary* sin_row = static_cast<const Rotary*>(p.sin) + row * p.sin_row_stride;
    for (int64_t i = 0; i < p.rotary_dim; ++i) {
      cos[i] = to_float(cos_row[i]);
      sin[i] = to_float(sin_row[i]);
    }
  }
  // With rotary_dim = head_dim / 2 both halves share one set of angles.
  const int64_t second = p.rotary_dim == dim ? half : 0;
  const auto put = [&](T* target, const T* source) {
    if (rotates) {
      rotate(target, source, cos, cos + second, sin, sin + second, half);
    } else {
      __builtin_memcpy(target, source, dim * sizeof(T));
    }
  };

  for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    const T* key = static_cast<const T*>(p.key) + offset(p.key_strides, 0, row, head);
    const T* value = static_cast<const T*>(p.value) + offset(p.value_strides, 0, row, head);
    Cache* key_target =
        static_cast<Cache*>(p.key_cache) + offset(p.key_cache_strides, 0, slot, head, column);
    Cache* value_target =
        static_cast<Cache*>(p.value_cache) + offset(p.value_cache_strides, 0, slot, head, column);
    if constexpr (sizeof(Cache) != 1) {
      put(key_target, key);
      __builtin_memcpy(value_target, value, dim * sizeof(T));
    } else {
      // Quantizes exactly what a cache of T would hold, so the bits do not depend on how the token
      // came into the cache.
      T rotated[kMaxHeadDim];
      put(rotated, key);
      const KvScales& scales = p.scales;
      scales.key[offset(scales.key_strides, 0, slot, head, column)] =
          quantize(rotated, dim, key_target);
      scales.value[offset(scales.value_strides, 0, slot, head, column)] =
          quantize(value, dim, value_target);
    }
  }
  for (int64_t head = 0; head < p.num_heads; ++head) {
    put(static_cast<T*>(p.rotated_query) + (row * p.num_heads + head) * dim,
        static_cast<const T*>(p.query) + offset(p.query_strides, 0, row, head));
  }
}

}  // namespace

void append_kv(const AppendKvParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    const auto rows = [&]<typename Cache>() {
      for (int64_t row = begin; row < end; ++row) {
        if (p.rotary_dtype == Dtype::kFloat32) {
          append_row<T, float, Cache>(p, row);
        } else {
          append_row<T, T, Cache>(p, row);
        }
      }
    };
    if (is_eight_bit(p.cache_dtype)) return dispatch_eight_bit(p.cache_dtype, rows);
    rows.template operator()<T>();
  });
}

}  // namespace baton::cpu::BATON_ISA
