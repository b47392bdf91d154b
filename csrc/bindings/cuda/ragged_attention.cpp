// ragged_attention: the workspace of its split rows, the choice of a prefill kernel, and the CUDA
// call.
#include "bindings/ragged_attention.h"

#include <cstdlib>
#include <string_view>

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

namespace {

// The kernel that BATON_PREFILL names. Read at every call, so that one process can compare them.
PrefillKernel prefill_kernel() {
  const char* value = std::getenv("BATON_PREFILL");
  const std::string_view name = value ? value : "";
  if (name == "") return PrefillKernel::kAutomatic;
  if (name == "mma") return PrefillKernel::kMma;
  if (name == "mma32") return PrefillKernel::kMma32;
  if (name == "wgmma") return PrefillKernel::kWgmma;
  throw std::invalid_argument(format(
      "ragged_attention: BATON_PREFILL must be mma, mma32 or wgmma, got ", std::string(name)));
}

// Chosen before the device is looked at: a wrong name is an error on a machine without one, too.
struct ChosenKernel {
  PrefillKernel prefill = prefill_kernel();
};

struct Cuda : ChosenKernel, CudaDevice<cuda::ragged_attention> {
  Cuda(const Checker& check, const Tensor& tensor) : CudaDevice(check, tensor) {}

  void run(RaggedAttentionParams& p, const Tensor& query) const {
    p.prefill = prefill;
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
