// A row of shared memory too many.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void dynamic_shared_out_of_bounds_kernel(float* x, int offset) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  tile[threadIdx.x] = x[threadIdx.x];
  if (static_cast<int>(threadIdx.x) < offset) tile[64 + threadIdx.x] = 0;
  __syncthreads();
  x[threadIdx.x] = tile[63 - threadIdx.x];
}
}  // namespace

DEFECT(dynamic_shared_out_of_bounds) {
  defects::Array x("x", 64, 2);
  baton::cuda::launch(dynamic_shared_out_of_bounds_kernel, dim3(1), dim3(64), 256, nullptr,
                      static_cast<float*>(x), wrong ? 1 : 0);
  return x.values[0] == 2;
}
