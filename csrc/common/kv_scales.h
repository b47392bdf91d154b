// Eight-bit keys and values: the elements of one token and KV head share a float32 scale.
//
//   amax = max |x|;  scale = amax / top;  element = round(x / scale), ties to even
//
// top is 127 (int8, elements within [-127, 127]) or 448 (e4m3fn). Where the quotient amax / top is
// below the smallest normal float32, scale and elements are 0; where an element of x is NaN or
// infinite, the scale is NaN and the elements are 0. An element stands for element * scale.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"

namespace baton {

// Scales [num_layers, num_slots, num_kv_heads, capacity] of keys and values; null for caches of
// floats. Strides are in elements, like those of a cache.
struct KvScales {
  float* key = nullptr;
  float* value = nullptr;
  CacheStrides key_strides, value_strides;
};

// Tokens that are copied out of a cache unconverted take their scales along: the bytes of a scale
// follow the elements of its head.
constexpr int64_t kScaleBytes = sizeof(float);

}  // namespace baton
