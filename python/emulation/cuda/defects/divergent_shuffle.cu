// A shuffle of all lanes that half of them never reach.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void divergent_shuffle_kernel(float* x, bool wrong) {
  float value = x[threadIdx.x];
  if (!wrong || threadIdx.x % 2 == 0) value = __shfl_xor_sync(~0u, value, 2);
  x[threadIdx.x] = value;
}
}  // namespace

DEFECT(divergent_shuffle) {
  defects::Array x("x", 32, 2);
  baton::cuda::launch(divergent_shuffle_kernel, dim3(1), dim3(32), 0, nullptr,
                      static_cast<float*>(x), wrong);
  return x.values[0] == 2;
}
