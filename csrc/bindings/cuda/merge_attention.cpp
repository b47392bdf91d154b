// merge_attention: the CUDA call.
#include "bindings/merge_attention.h"

#include <torch/csrc/stable/library.h>

#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("merge_attention", TORCH_BOX(&merge_attention<CudaDevice<cuda::merge_attention>>));
}

}  // namespace baton::bindings
