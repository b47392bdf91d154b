#include "bindings/cuda/cuda_device.h"

#include <cuda_runtime_api.h>

namespace baton::bindings {

CudaCall::CudaCall(const Checker& check, const Tensor& tensor) : op_(check.op()) {
  // Checked once: without a driver or a GPU, torch's own error is long and does not name the op.
  static const cudaError_t found = [] {
    int count = 0;
    return cudaGetDeviceCount(&count);
  }();
  finish(found);
  const int32_t device = tensor.get_device_index();
  guard_.emplace(device);
  // The guard uses torch's CUDA runtime; this library has a separate one, with its own current
  // device.
  finish(cudaSetDevice(device));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

void CudaCall::finish(cudaError_t error) const {
  if (error == cudaSuccess) return;
  // Launch errors are not sticky, but the next call that checks would see them.
  cudaGetLastError();
  throw std::runtime_error(format(op_, ": CUDA error ", static_cast<int>(error), " (",
                                  cudaGetErrorName(error), "): ", cudaGetErrorString(error)));
}

}  // namespace baton::bindings
