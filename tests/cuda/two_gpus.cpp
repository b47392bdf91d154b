// Two GPUs as the CUDA bindings see them: torch's CUDA runtime and this library's own, which is
// linked statically, have a current device each. Both must be that of a call's tensors when its
// kernel is launched, and torch's what it was when the call is over. Runtime and torch are stand-ins
// that note what they are told.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>

#include "bindings/cuda/cuda_device.h"

namespace {

// The current devices, and what a launch found.
int32_t torchs = 0, ours = 0, launched_on = -1;
void* launched_in = nullptr;
cudaError_t set_device_gives = cudaSuccess;
// Torch's current stream on each device.
char streams[2];
int32_t tensor_devices[2] = {0, 1};

void expect(bool condition, const char* text, int line) {
  if (condition) return;
  std::fprintf(stderr, "line %d: %s\n", line, text);
  std::exit(1);
}
#define EXPECT(condition) expect(condition, #condition, __LINE__)

}  // namespace

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 2;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (set_device_gives == cudaSuccess) ours = device;
  return set_device_gives;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "cudaErrorName"; }
const char* cudaGetErrorString(cudaError_t) { return "its text"; }

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  *index = *reinterpret_cast<int32_t*>(tensor);
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle, int32_t* type) {
  *type = 1;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
  *stream = &streams[device];
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
  *guard = reinterpret_cast<DeviceGuardHandle>(new int32_t(torchs));
  torchs = device;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle guard) {
  auto* before = reinterpret_cast<int32_t*>(guard);
  torchs = *before;
  delete before;
  return AOTI_TORCH_SUCCESS;
}
}

namespace baton::cuda {

cudaError_t fill_indices(const IndicesParams&, cudaStream_t stream) {
  launched_on = ours;
  launched_in = stream;
  return cudaSuccess;
}

}  // namespace baton::cuda

int main() {
  using baton::bindings::Checker, baton::bindings::CudaCall, baton::bindings::Tensor;
  // Torch's current device changes between the calls, and ours stays where the last call left it.
  for (const int32_t current : {0, 1}) {
    torchs = current;
    for (const int32_t device : {1, 0, 0, 1}) {
      const Tensor tensor(reinterpret_cast<AtenTensorHandle>(&tensor_devices[device]));
      {
        const CudaCall call(Checker("op"), tensor);
        EXPECT(torchs == device);
        call.fill_indices({});
      }
      EXPECT(launched_on == device && launched_in == &streams[device]);
      EXPECT(torchs == current);
    }
  }
  set_device_gives = cudaErrorInvalidDevice;
  const Tensor tensor(reinterpret_cast<AtenTensorHandle>(&tensor_devices[0]));
  std::string error;
  try {
    const CudaCall call(Checker("op"), tensor);
  } catch (const std::runtime_error& e) {
    error = e.what();
  }
  EXPECT(error == "op: CUDA error 101 (cudaErrorName): its text");
  EXPECT(torchs == 1);
}
