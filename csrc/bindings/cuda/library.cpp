// Reports what the CUDA library was compiled for. Loading it registers the CUDA kernels of the ops
// whose schemas bindings/library.cpp defines.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace baton::bindings {

// The CUDA toolkit's version as cudart counts it, then the compute capabilities: "13000 80 90".
std::string cuda_build() { return std::to_string(CUDART_VERSION) + " " BATON_CUDA_ARCHITECTURES; }

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_build", TORCH_BOX(&cuda_build));
}

}  // namespace baton::bindings
