// append_kv: the CUDA call.
#include "bindings/append_kv.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("append_kv", box<&append_kv<CudaDevice<cuda::append_kv>>>);
  library.impl("append_kv.query", box<&append_kv_query<CudaDevice<cuda::append_kv>>>);
}

}  // namespace baton::bindings
