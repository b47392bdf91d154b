// Threads of a kernel launched behind another end without having waited for it: what comes after
// the second kernel would not come after the first.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void filling_kernel(float* x) { x[threadIdx.x] = 2; }
__global__ void ends_before_grid_kernel(float* x, bool wrong) {
  if (wrong && threadIdx.x >= 4) return;
  baton::cuda::wait_for_grid_before();
  if (threadIdx.x < 4) x[threadIdx.x] += 1;
}
}  // namespace

DEFECT(ends_before_grid) {
  defects::Array x("x", 32);
  baton::cuda::launch(filling_kernel, dim3(1), dim3(32), 0, nullptr, static_cast<float*>(x));
  baton::cuda::launch_behind<ends_before_grid_kernel>(dim3(1), dim3(32), 0, nullptr,
                                                      static_cast<float*>(x), wrong);
  return x.values[0] == 3 && x.values[31] == 2;
}
