// A barrier that half a warp never reaches.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void divergent_barrier_kernel(float* x, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x] = x[threadIdx.x];
  if (!wrong || threadIdx.x < 16) __syncthreads();
  x[threadIdx.x] = tile[threadIdx.x];
}
}  // namespace

DEFECT(divergent_barrier) {
  defects::Array x("x", 64, 2);
  baton::cuda::launch(divergent_barrier_kernel, dim3(1), dim3(64), 256, nullptr,
                      static_cast<float*>(x), wrong);
  return x.values[0] == 2;
}
