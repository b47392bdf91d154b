// One element too many.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void global_out_of_bounds_kernel(float* x, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) x[i] = 1;
}
}  // namespace

DEFECT(global_out_of_bounds) {
  defects::Array x("x", 100);
  baton::cuda::launch(global_out_of_bounds_kernel, dim3(1), dim3(32), 0, nullptr,
                      static_cast<float*>(x), 100 + wrong);
  return x.values[99] == 1;
}
