// A 16-byte load from an address that is a multiple of 4.
#include "emulation/cuda/defects/defect.h"

namespace {
__global__ void misaligned_vector_kernel(const float* x, float* y) {
  baton::cuda::store_16(y + 4 * threadIdx.x, baton::cuda::load_16(x + 4 * threadIdx.x));
}
}  // namespace

DEFECT(misaligned_vector) {
  defects::Array x("x", 132, 2), y("y", 128);
  baton::cuda::launch(misaligned_vector_kernel, dim3(1), dim3(32), 0, nullptr,
                      static_cast<const float*>(x) + (wrong ? 1 : 0), static_cast<float*>(y));
  return y.values[127] == 2;
}
