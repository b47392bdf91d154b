// Uses the newest stage of a cp.async pipeline, having waited for the one before it only.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_wait_kernel(const float* x, float* y, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  for (int stage = 0; stage < 2; ++stage) {
    baton::cuda::copy_async_16(tile + stage * 128 + threadIdx.x * 4,
                               x + stage * 128 + threadIdx.x * 4);
    baton::cuda::copy_async_commit();
  }
  if (wrong) {
    baton::cuda::copy_async_wait<1>();
  } else {
    baton::cuda::copy_async_wait<0>();
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += 32) y[i] = tile[i];
}
}  // namespace

DEFECT(missing_wait) {
  defects::Array x("x", 256, 2), y("y", 256);
  baton::cuda::launch(missing_wait_kernel, dim3(1), dim3(32), 1024, nullptr,
                      static_cast<const float*>(x), static_cast<float*>(y), wrong);
  return y.values[0] == 2 && y.values[255] == 2;
}
