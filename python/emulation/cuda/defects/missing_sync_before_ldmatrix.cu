// Reads rows by ldmatrix that other lanes have copied: waiting for one's own copies is not enough.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void missing_sync_before_ldmatrix_kernel(const float* x, float* y, bool wrong) {
  BATON_DYNAMIC_SHARED(memory);
  // Two chunks of 16 bytes per lane: lane l brings rows l and l + 32, ldmatrix reads 4 x 8 rows.
  for (unsigned row = threadIdx.x; row < 64; row += 32) {
    baton::cuda::copy_async_16(memory + 16 * row, x + 4 * row);
  }
  baton::cuda::copy_async_commit();
  baton::cuda::copy_async_wait<0>();
  if (!wrong) __syncwarp();
  uint32_t registers[4];
  baton::cuda::load_matrix(registers, memory + 16 * (threadIdx.x + 16));
  for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = __uint_as_float(registers[i]);
}
}  // namespace

DEFECT(missing_sync_before_ldmatrix) {
  defects::Array x("x", 256, 2), y("y", 128);
  baton::cuda::launch(missing_sync_before_ldmatrix_kernel, dim3(1), dim3(32), 1024, nullptr,
                      static_cast<const float*>(x), static_cast<float*>(y), wrong);
  return y.values[0] == 2 && y.values[127] == 2;
}
