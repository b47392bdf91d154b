// Reads what another warp wrote without waiting for it.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_barrier_kernel(float* x, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x] = x[threadIdx.x];
  if (!wrong) __syncthreads();
  x[threadIdx.x] = tile[(threadIdx.x + 64) % 128];
}
}  // namespace

DEFECT(missing_barrier) {
  defects::Array x("x", 128, 2);
  baton::cuda::launch(missing_barrier_kernel, dim3(1), dim3(128), 512, nullptr,
                      static_cast<float*>(x), wrong);
  return x.values[0] == 2;
}
