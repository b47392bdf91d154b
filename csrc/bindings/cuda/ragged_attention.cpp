// ragged_attention: the workspace of its split rows, the choice of a prefill kernel, and the CUDA
// call.
#include "bindings/ragged_attention.h"

#include <cstdlib>
#include <string_view>

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

namespace {

// BATON_PREFILL: "wgmma" selects the kernel that only compute capability 9.0 has. Read at every
// call, so that one process can compare the two.
bool asks_for_warpgroups() {
  const char* value = std::getenv("BATON_PREFILL");
  const std::string_view name = value ? value : "";
  if (name != "" && name != "mma" && name != "wgmma") {
    throw std::invalid_argument(
        format("ragged_attention: BATON_PREFILL must be mma or wgmma, got ", std::string(name)));
  }
  return name == "wgmma";
}

struct Cuda : CudaDevice<cuda::ragged_attention> {
  using CudaDevice::CudaDevice;

  void run(RaggedAttentionParams& p, const Tensor& query) const {
    p.warpgroup_prefill = asks_for_warpgroups();
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
