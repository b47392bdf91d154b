// move_kv: the CUDA call.
#include "bindings/move_kv.h"

#include <torch/csrc/stable/library.h>

#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("move_kv", TORCH_BOX(&move_kv<CudaDevice<cuda::move_kv>>));
}

}  // namespace baton::bindings
