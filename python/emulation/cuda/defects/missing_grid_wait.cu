// A kernel launched behind another reads what that one wrote before it has waited for it.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void first_kernel(float* x) {
  baton::cuda::let_next_grid_start();
  x[threadIdx.x] = 2;
}
__global__ void missing_grid_wait_kernel(const float* x, float* y, bool wrong) {
  if (!wrong) baton::cuda::wait_for_grid_before();
  y[threadIdx.x] = x[threadIdx.x];
  if (wrong) baton::cuda::wait_for_grid_before();
}
}  // namespace

DEFECT(missing_grid_wait) {
  defects::Array x("x", 32), y("y", 32);
  baton::cuda::launch(first_kernel, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(x));
  baton::cuda::launch_behind<missing_grid_wait_kernel>(
      dim3(1), dim3(32), 0, nullptr, static_cast<const float*>(x), static_cast<float*>(y), wrong);
  return y.values[0] == 2;
}
