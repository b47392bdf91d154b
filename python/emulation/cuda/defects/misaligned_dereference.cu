// The same without the wrapper functions.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void misaligned_dereference_kernel(const float* x, float* y) {
  y[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x].x;
}
}  // namespace

DEFECT(misaligned_dereference) {
  defects::Array x("x", 132, 2), y("y", 32);
  baton::cuda::launch(misaligned_dereference_kernel, dim3(1), dim3(32), 0, nullptr,
                      static_cast<const float*>(x) + (wrong ? 1 : 0), static_cast<float*>(y));
  return y.values[31] == 2;
}
