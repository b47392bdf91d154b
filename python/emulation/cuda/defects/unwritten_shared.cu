// Reads a row of shared memory that nobody has written; the result happens not to use it.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void unwritten_shared_kernel(const float* x, float* y, int rows) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  for (int i = threadIdx.x; i < rows * 32; i += 32) tile[i] = x[i];
  __syncthreads();
  float total = 0;
  for (int row = 0; row < 4; ++row) {
    const float value = tile[row * 32 + threadIdx.x];
    total += value == value ? value : 0;
  }
  y[threadIdx.x] = total;
}
}  // namespace

DEFECT(unwritten_shared) {
  defects::Array x("x", 128, 2), y("y", 32);
  baton::cuda::launch(unwritten_shared_kernel, dim3(1), dim3(32), 512, nullptr,
                      static_cast<const float*>(x), static_cast<float*>(y), wrong ? 3 : 4);
  return true;
}
