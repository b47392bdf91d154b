// move_kv: the CUDA call.
#include "bindings/move_kv.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("move_kv", box<&move_kv<CudaDevice<cuda::move_kv>>>);
}

}  // namespace baton::bindings
