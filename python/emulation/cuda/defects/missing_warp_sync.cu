// Reads what another lane wrote without __syncwarp; the shuffle before it orders no memory.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_warp_sync_kernel(float* x, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  float* tile = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32;
  tile[threadIdx.x] = __shfl_xor_sync(~0u, x[threadIdx.x], 1);
  __shfl_xor_sync(~0u, lane, 1);
  if (!wrong) __syncwarp();
  x[threadIdx.x] = tile[threadIdx.x - lane + (lane + 1) % 32];
}
}  // namespace

DEFECT(missing_warp_sync) {
  defects::Array x("x", 64, 2);
  baton::cuda::launch(missing_warp_sync_kernel, dim3(1), dim3(64), 256, nullptr,
                      static_cast<float*>(x), wrong);
  return x.values[0] == 2;
}
