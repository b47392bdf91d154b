// insert_kv: the CUDA call.
#include "bindings/insert_kv.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("insert_kv", box<&insert_kv<CudaDevice<cuda::insert_kv>>>);
}

}  // namespace baton::bindings
