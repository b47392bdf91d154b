// Tensor core products of the attention kernels, the same on every architecture: m16n8k16 where it
// exists, two m16n8k8 for half on sm_75, and for bfloat16 on sm_75 shuffles and float arithmetic.
#pragma once

#include "cuda/device/device.h"

namespace baton::cuda {

// As mma<T, 16> of cuda/device/ptx.h: sums += a b.
template <typename T>
__device__ __forceinline__ void multiply_16(float (&sums)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if BATON_ARCH >= 800 || BATON_ARCH == 0
  mma<T, 16>(sums, a, b);
#else
  if constexpr (std::is_same_v<T, __half>) {
    // Depth 8 to 15 lies in the upper registers of both.
    mma<T, 8>(sums, {a[0], a[1]}, {b[0]});
    mma<T, 8>(sums, {a[2], a[3]}, {b[1]});
  } else {
    const int lane = threadIdx.x % 32, rows = lane & ~3, columns = lane % 4 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Not unrolled: the shuffles of all turns at once would take more registers than there are.
#pragma unroll 1
      for (int t = 0; t < 4; ++t) {
        const uint32_t a0 = __shfl_sync(~0u, a[2 * half], rows + t);
        const uint32_t a1 = __shfl_sync(~0u, a[2 * half + 1], rows + t);
        const uint32_t b0 = __shfl_sync(~0u, b[half], columns + t);
        const uint32_t b1 = __shfl_sync(~0u, b[half], columns + 4 + t);
        const float2 top = unpack<T>(a0), bottom = unpack<T>(a1);
        const float2 left = unpack<T>(b0), right = unpack<T>(b1);
        sums[0] = fmaf(top.y, left.y, fmaf(top.x, left.x, sums[0]));
        sums[1] = fmaf(top.y, right.y, fmaf(top.x, right.x, sums[1]));
        sums[2] = fmaf(bottom.y, left.y, fmaf(bottom.x, left.x, sums[2]));
        sums[3] = fmaf(bottom.y, right.y, fmaf(bottom.x, right.x, sums[3]));
      }
    }
  }
#endif
}

// Not zero if one of two 16-bit elements is NaN or infinite: an exponent of ones, which any more
// carries into the sign.
template <typename T>
__device__ __forceinline__ uint32_t non_finite(uint32_t pair) {
  constexpr uint32_t kLowest = std::is_same_v<T, __half> ? 0x04000400 : 0x00800080;
  return ((pair & 0x7fff7fff) + kLowest) & 0x80008000;
}

// The largest probability that is 0 in 16 bits: half of the smallest number above 0.
template <typename T>
constexpr float kVanishing = std::is_same_v<T, __half> ? 0x1p-25f : 0x1p-134f;

// Running maximum of a vector that has seen nothing: finite, since -inf - -inf is NaN, and so far
// down that what is relative to it vanishes compared with any score.
constexpr float kNoScore = -3.0e38f;

}  // namespace baton::cuda
