// Reads what another block has written: a barrier that both have passed orders neither.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void block_race_across_barrier_kernel(float* x, float* y, bool wrong) {
  if (threadIdx.x == 0) x[blockIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 1) y[blockIdx.x] = x[wrong ? 0 : blockIdx.x];
}
}  // namespace

DEFECT(block_race_across_barrier) {
  defects::Array x("x", 4), y("y", 4);
  baton::cuda::launch(block_race_across_barrier_kernel, dim3(4), dim3(32), 0, nullptr,
                      static_cast<float*>(x), static_cast<float*>(y), wrong);
  return y.values[3] == 1;
}
