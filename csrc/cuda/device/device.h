// What a kernel source needs besides CUDA C++: launches, dynamic shared memory and element types,
// in the few forms that nvcc and the host compiler of the tests (python/emulation) both understand.
#pragma once

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__)
#define BATON_ARCH __CUDA_ARCH__
#else
#define BATON_ARCH 0  // the host's half of a compilation: no kernel is generated
#endif
#else
#include "emulation/cuda/cuda_emulation.h"
#endif

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"
#include "cuda/device/ptx.h"

// Names the block's dynamic shared memory: `unsigned char` of the size that the launch requested,
// from a multiple of 128 or of `alignment` on.
#if defined(__CUDACC__)
#define BATON_ALIGNED_SHARED(name, alignment) \
  extern __shared__ __align__(alignment)      \
  unsigned char name[]
#else
#define BATON_ALIGNED_SHARED(name, alignment) EMULATION_DYNAMIC_SHARED(name)
#endif
#define BATON_DYNAMIC_SHARED(name) BATON_ALIGNED_SHARED(name, 128)

namespace baton::cuda {

// A block gets this much dynamic shared memory without a request.
constexpr std::size_t kDefaultSharedBytes = 48 * 1024;
// The most blocks of a grid along y, and along z.
constexpr int64_t kMaxGridYZ = 65535;

#if defined(__CUDACC__)
// An attribute of the current device; 0 if it is not known. No query of an attribute waits for the
// device, and a launch finds out if there is none.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    return 0;
  }
  return value;
}
#endif

// Multiprocessors of the current device.
inline int multiprocessors() {
#if defined(__CUDACC__)
  return std::max(device_attribute(cudaDevAttrMultiProcessorCount), 1);
#else
  return emulation::kMultiprocessors;
#endif
}

// Compute capability of the current device, without its second number.
inline int compute_capability() {
#if defined(__CUDACC__)
  return device_attribute(cudaDevAttrComputeCapabilityMajor);
#else
  return BATON_ARCH / 100;
#endif
}

// Whether the current device has products of warpgroups, and this library kernels with them, which
// no other compute capability than 9.0 runs.
inline bool has_warpgroup_products() {
#if defined(__CUDACC__) && defined(BATON_SM_90A)
  return compute_capability() == 9 && device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
#elif defined(__CUDACC__)
  return false;
#else
  return emulation::kHasWarpgroupProducts;
#endif
}

// Bytes of shared memory of a multiprocessor.
inline int64_t multiprocessor_shared_bytes() {
#if defined(__CUDACC__)
  return device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
#else
  return emulation::kMultiprocessorSharedBytes;
#endif
}

#if defined(__CUDACC__)
// Every launch goes through here. Returns the launch's own error and leaves errors of earlier work
// to those who look for them.
template <typename... Params, typename... Args>
cudaError_t launch_with(cudaLaunchAttribute* attributes, unsigned num_attributes,
                        void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                        cudaStream_t stream, const Args&... args) {
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Whether the current device's code of a kernel was made for compute capability 9 or later, and so
// has the wait in wait_for_grid_before(). Known after the first call for a device.
template <auto kKernel>
bool has_grid_wait() {
  constexpr int kDevices = 64;
  enum : int8_t { kUnknown, kLacks, kHas };
  static std::atomic<int8_t> known[kDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  int8_t has = known[device].load(std::memory_order_relaxed);
  if (has == kUnknown) {
    cudaFuncAttributes attributes{};
    if (cudaFuncGetAttributes(&attributes, kKernel) != cudaSuccess) return false;
    has = attributes.ptxVersion >= 90 ? kHas : kLacks;
    known[device].store(has, std::memory_order_relaxed);
  }
  return has == kHas;
}
#endif

// Starts when the stream's work before has ended.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t shared_bytes,
                   cudaStream_t stream, const Args&... args) {
#if defined(__CUDACC__)
  return launch_with(nullptr, 0, kernel, grid, block, shared_bytes, stream, args...);
#else
  return emulation::launch(kernel, grid, block, shared_bytes, stream, args...);
#endif
}

// Starts earlier where the device can: the kernel, of which every thread waits for the grid before,
// is launched behind one of ours, and on the device when that one ends.
template <auto kKernel, typename... Args>
cudaError_t launch_behind(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream,
                          const Args&... args) {
#if defined(__CUDACC__)
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return launch_with(&attribute, has_grid_wait<kKernel>() ? 1 : 0, kKernel, grid, block,
                     shared_bytes, stream, args...);
#else
  return emulation::launch_behind(kKernel, grid, block, shared_bytes, stream, args...);
#endif
}

// Storage type of an element -> the device's arithmetic type.
template <typename T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<Half> {
  using type = __half;
};
template <>
struct DeviceType<BFloat16> {
  using type = __nv_bfloat16;
};
template <typename T>
using device_t = typename DeviceType<T>::type;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two 16-bit elements of a register, the first one in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &pair, sizeof(bits));
  }
  return bits;
}

}  // namespace baton::cuda
