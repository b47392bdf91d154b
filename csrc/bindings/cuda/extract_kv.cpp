// extract_kv: the CUDA call.
#include "bindings/extract_kv.h"

#include "bindings/box.h"
#include "bindings/cuda/cuda_device.h"

namespace baton::bindings {

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CUDA, library) {
  library.impl("extract_kv", box<&extract_kv<CudaDevice<cuda::extract_kv>>>);
  library.impl("extract_kv.out", box<&extract_kv_out<CudaDevice<cuda::extract_kv>>>);
}

}  // namespace baton::bindings
