// Tensors as the bindings see them: torch's stable ABI, and how results are allocated.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace baton::bindings {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// The shim's numbers of devices and dtypes, which torch's are told apart by: asked for once.
struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t boolean = aoti_torch_dtype_bool();
};
inline const Codes kCodes;

inline int32_t device_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &code));
  return code;
}

// Comparing two of these is one comparison, where Tensor::scalar_type looks its result up.
inline int32_t dtype_code(const Tensor& tensor) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
  return code;
}

// An uninitialized tensor on the device of `like`. torch::stable::new_empty does the same by the
// name of the operator, and takes twice as long to find it as to allocate; this entry of the shim
// is what it called until torch 2.10, and calls the operator itself.
inline Tensor allocate(const Tensor& like, Sizes sizes, int32_t dtype) {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), sizes.data(),
                                                   static_cast<int64_t>(sizes.size()), &dtype,
                                                   nullptr, nullptr, 0, nullptr, &result));
  return Tensor(result);
}
inline Tensor allocate(const Tensor& like, Sizes sizes) {
  return allocate(like, sizes, dtype_code(like));
}

// A result of a schema that was not asked for: [0] or [0, width], and no memory.
inline Tensor no_result(const Tensor& like, int32_t dtype, int64_t width = -1) {
  const int64_t sizes[] = {0, width}, strides[] = {width > 1 ? width : 1, 1};
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(width < 0 ? 1 : 2, sizes, strides, dtype,
                                                  device_code(like), like.get_device_index(),
                                                  &result));
  return Tensor(result);
}

}  // namespace baton::bindings
