// merge_attention: the CUDA call.
#include "bindings/merge_attention.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("merge_attention", box<&merge_attention<CudaDevice<cuda::merge_attention>>>);
}

}  // namespace baton::bindings
