// The last block to arrive sums what the others left, which they must have published first.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_fence_kernel(float* partials, unsigned* arrived, float* total, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  unsigned* last = reinterpret_cast<unsigned*>(memory);
  partials[blockIdx.x * 32 + threadIdx.x] = 1;
  if (!wrong) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  if (*last) {
    float result = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) result += partials[i * 32 + threadIdx.x];
    total[threadIdx.x] = result;
  }
}
}  // namespace

DEFECT(missing_fence) {
  defects::Array partials("partials", 128), arrived("arrived", 1), total("total", 32);
  baton::cuda::launch(
      missing_fence_kernel, dim3(4), dim3(32), 4, nullptr, static_cast<float*>(partials),
      reinterpret_cast<unsigned*>(static_cast<float*>(arrived)), static_cast<float*>(total), wrong);
  return total.values[0] == 4;
}
