// ragged_attention: the workspace of its split rows and the CUDA call.
#include "bindings/ragged_attention.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

namespace {

struct Cuda : CudaDevice<cuda::ragged_attention> {
  using CudaDevice::CudaDevice;

  void run(RaggedAttentionParams& p, const Tensor& query) const {
    // From torch's allocator, which also works while a CUDA graph is captured, and does not reuse
    // the memory on another stream before these kernels have finished.
    Tensor workspace = allocate(query, {cuda::ragged_attention_workspace(p)}, kCodes.float32);
    p.workspace = static_cast<float*>(workspace.mutable_data_ptr());
    CudaDevice::run(p, query);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("ragged_attention", box<&RaggedAttention<Cuda>::plain>);
  library.impl("ragged_attention.options", box<&RaggedAttention<Cuda>::options<false>>);
  library.impl("ragged_attention.lse", box<&RaggedAttention<Cuda>::options<true>>);
  library.impl("ragged_attention.out", box<&RaggedAttention<Cuda>::out>);
  library.impl("ragged_attention.lse_out", box<&RaggedAttention<Cuda>::lse_out>);
}

}  // namespace baton::bindings
