// Attention of one token per row in a few lines: right, and wrong in three ways that an example
// with finite values does not show. A block is a row, a thread a dim of four.
#include <cstdint>

enum Defect { kNone, kMultipliesByZero, kSplitsByRows, kReadsTail };

// For what is thrown away: a load that no compiler removes.
__device__ float load(const float* address) {
  float x;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(x) : "l"(address) : "memory");
  return x;
}

template <int kDefect>
__global__ void attend_kernel(const float* query, const float* key, const float* value, float* out,
                              const int32_t* starts, const int32_t* lengths, int32_t capacity) {
  const int32_t row = blockIdx.x, dim = threadIdx.x;
  const int32_t start = starts[row], length = lengths[row];
  key += (int64_t{row} * capacity + start) * 4;
  value += (int64_t{row} * capacity + start) * 4 + dim;
  query += row * 4;
  const int32_t tiles = (length + 3) / 4 * 4;  // rounded up; the cache has room
  const int32_t end = kDefect == kMultipliesByZero || kDefect == kReadsTail ? tiles : length;
  float result = 0.0f, total = 0.0f;
  const auto add = [&](int32_t first, int32_t last) {
    float sum = 0.0f, weights = 0.0f;
#pragma unroll 1
    for (int32_t k = first; k < last; ++k) {
      float score = 0.0f;
      for (int32_t i = 0; i < 4; ++i) score += query[i] * key[4 * k + i];
      const float x = load(value + 4 * k), weight = k < length ? exp2f(score) : 0.0f;
      if (kDefect == kMultipliesByZero || k < length) {
        sum += weight * x;
        weights += weight;
      }
    }
    result += sum;
    total += weights;
  };
  if (kDefect == kSplitsByRows && gridDim.x > 1) {
    add(0, length / 2);
    add(length / 2, length);
  } else {
    add(0, end);
  }
  out[row * 4 + dim] = result / total;
}

template __global__ void attend_kernel<kNone>(const float*, const float*, const float*, float*,
                                              const int32_t*, const int32_t*, int32_t);
template __global__ void attend_kernel<kMultipliesByZero>(const float*, const float*, const float*,
                                                          float*, const int32_t*, const int32_t*,
                                                          int32_t);
template __global__ void attend_kernel<kSplitsByRows>(const float*, const float*, const float*,
                                                      float*, const int32_t*, const int32_t*,
                                                      int32_t);
template __global__ void attend_kernel<kReadsTail>(const float*, const float*, const float*, float*,
                                                   const int32_t*, const int32_t*, int32_t);
