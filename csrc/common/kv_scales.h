// Keys and values of eight bits: the elements of one token and KV head share a float32 scale.
//
//   amax = max |x|;  scale = amax / top;  element = round(x / scale), even of two at a tie
//
// top is 127 (int8, elements within [-127, 127]) or 448 (e4m3fn). Where the quotient amax / top is
// below the smallest normal float32, scale and elements are 0; where an element of x is NaN or
// infinite, the scale is NaN and the elements are 0. An element stands for element * scale.
#pragma once

#include "common/cache.h"
#include "common/dtype.h"

namespace baton {

// Scales [num_layers, num_slots, num_kv_heads, capacity] of keys and values; null in caches of
// floats. Strides in elements, as a cache's.
struct KvScales {
  float* key = nullptr;
  float* value = nullptr;
  CacheStrides key_strides, value_strides;
};

// Tokens that leave a cache as they are carry their scales: its bytes stand behind the elements of
// a head.
constexpr int64_t kScaleBytes = sizeof(float);

}  // namespace baton
