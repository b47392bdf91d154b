// Two blocks write one word.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void block_race_kernel(float* x, bool wrong) {
  if (threadIdx.x == 0) x[wrong ? 0 : blockIdx.x] = 1;
}
}  // namespace

DEFECT(block_race) {
  defects::Array x("x", 4);
  baton::cuda::launch(block_race_kernel, dim3(4), dim3(32), 0, nullptr, static_cast<float*>(x),
                      wrong);
  return x.values[0] == 1;
}
