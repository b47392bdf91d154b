// The next tile overwrites the last one while other warps still read it.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_trailing_barrier_kernel(const float* x, float* y, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  float total = 0;
  for (int i = 0; i < 4; ++i) {
    tile[threadIdx.x] = x[i * 128 + threadIdx.x];
    __syncthreads();
    for (int k = 0; k < 128; ++k) total += tile[(threadIdx.x + k) % 128];
    if (!wrong) __syncthreads();
  }
  y[threadIdx.x] = total;
}
}  // namespace

DEFECT(missing_trailing_barrier) {
  defects::Array x("x", 512, 2), y("y", 128);
  baton::cuda::launch(missing_trailing_barrier_kernel, dim3(1), dim3(128), 512, nullptr,
                      static_cast<const float*>(x), static_cast<float*>(y), wrong);
  return y.values[0] == 1024;
}
