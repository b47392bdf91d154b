// An index past a static shared array.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void static_shared_out_of_bounds_kernel(float* x, int offset) {
  __shared__ float tile[64];
  tile[threadIdx.x + offset] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[63 - threadIdx.x];
}
}  // namespace

DEFECT(static_shared_out_of_bounds) {
  defects::Array x("x", 64, 2);
  baton::cuda::launch(static_shared_out_of_bounds_kernel, dim3(1), dim3(64), 0, nullptr,
                      static_cast<float*>(x), wrong ? 1 : 0);
  return true;
}
