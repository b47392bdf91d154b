// Runs a CUDA kernel for torch: on the device of the tensors, on torch's current stream there, with
// errors as exceptions. Nothing waits for the device, so every call may be captured in a CUDA
// graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "bindings/checks.h"
#include "cuda/kernels.h"

namespace baton::bindings {

// A call of an op: as long as it exists, the device of its tensors is the current one.
class CudaCall {
 public:
  CudaCall(const Checker& check, const Tensor& tensor);

  void fill_indices(const IndicesParams& p) const { finish(cuda::fill_indices(p, stream())); }

 protected:
  cudaStream_t stream() const { return stream_; }
  // Raises RuntimeError if the launch failed.
  void finish(cudaError_t error) const;

 private:
  const char* op_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_ = nullptr;
};

// A CUDA device, as the bindings of an op use it.
template <auto kKernel>
struct CudaDevice : CudaCall {
  using CudaCall::CudaCall;
  static constexpr DeviceType kType = DeviceType::CUDA;

  // Index values are on the device; the kernels skip those that are out of range.
  template <typename Params>
  static void check_values(const Checker&, const Params&) {}

  template <typename Params>
  void run(const Params& p, const Tensor&) const {
    finish(kKernel(p, stream()));
  }
};

}  // namespace baton::bindings
