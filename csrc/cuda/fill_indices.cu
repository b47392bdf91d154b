// The index arguments that a call leaves out: values[i] = i for i <= num_rows, and then num_rows
// zeros. A thread writes one value.
#include "cuda/device/device.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int32_t kFillThreads = 128;

__global__ void __launch_bounds__(kFillThreads)
    fill_indices_kernel(const __grid_constant__ IndicesParams p) {
  const int64_t i = int64_t{blockIdx.x} * kFillThreads + threadIdx.x;
  if (i <= 2 * p.num_rows) p.values[i] = i <= p.num_rows ? static_cast<int32_t>(i) : 0;
}

}  // namespace

cudaError_t fill_indices(const IndicesParams& p, cudaStream_t stream) {
  const int64_t blocks = (2 * p.num_rows + kFillThreads) / kFillThreads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  return launch(fill_indices_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kFillThreads), 0,
                stream, p);
}

}  // namespace baton::cuda
