// Tensors in the bindings: torch's stable ABI, and the allocation of results.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <utility>

namespace baton::bindings {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Owns the handle of a tensor. torch::stable::Tensor shares it, which takes an allocation for each
// argument of a call and each result.
class Tensor {
 public:
  explicit Tensor(AtenTensorHandle handle) : handle_(handle) {}
  Tensor(Tensor&& other) noexcept : handle_(other.release()) {}
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  AtenTensorHandle get() const { return handle_; }
  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

  int64_t dim() const { return ask<int64_t, aoti_torch_get_dim>(); }
  int64_t numel() const { return ask<int64_t, aoti_torch_get_numel>(); }
  bool is_contiguous() const { return ask<bool, aoti_torch_is_contiguous>(); }
  Sizes sizes() const { return Sizes(ask<int64_t*, aoti_torch_get_sizes>(), dim()); }
  Sizes strides() const { return Sizes(ask<int64_t*, aoti_torch_get_strides>(), dim()); }
  const void* const_data_ptr() const { return ask<const void*, torch_get_const_data_ptr>(); }
  void* mutable_data_ptr() const { return ask<void*, torch_get_mutable_data_ptr>(); }
  // The stable ABI's codes of dtype and device: see kCodes.
  int32_t dtype_code() const { return ask<int32_t, aoti_torch_get_dtype>(); }
  int32_t device_code() const { return ask<int32_t, aoti_torch_get_device_type>(); }
  int32_t get_device_index() const { return ask<int32_t, aoti_torch_get_device_index>(); }
  ScalarType scalar_type() const {
    return torch::stable::detail::to<ScalarType>(torch::stable::detail::from(dtype_code()));
  }

 private:
  template <typename T, AOTITorchError (*kQuestion)(AtenTensorHandle, T*)>
  T ask() const {
    T answer;
    if (kQuestion(handle_, &answer) != AOTI_TORCH_SUCCESS) {
      throw std::invalid_argument(
          "baton_kernels: tensors must have strides, got one without: sparse, nested or another");
    }
    return answer;
  }

  AtenTensorHandle handle_;
};

// The stable ABI's codes of devices and dtypes, looked up once and compared with those of tensors.
struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t cuda = aoti_torch_device_type_cuda();
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float16 = aoti_torch_dtype_float16();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t int32 = aoti_torch_dtype_int32();
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t int8 = aoti_torch_dtype_int8();
  int32_t boolean = aoti_torch_dtype_bool();
  int32_t float8 = aoti_torch_dtype_float8_e4m3fn();
};
inline const Codes kCodes;

// The largest number of dimensions of a result: tokens with layers.
constexpr size_t kMaxResultDims = 4;

// An uninitialized contiguous tensor on the device of `like`. Of the stable ABI's ways to create
// one this is the shortest: on the CPU it calls no operator.
inline Tensor allocate(const Tensor& like, Sizes sizes, int32_t dtype) {
  int64_t strides[kMaxResultDims], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    if (__builtin_mul_overflow(stride, std::max<int64_t>(sizes[i], 1), &stride)) {
      throw std::runtime_error("baton_kernels: a result has more than 2^63 elements");
    }
  }
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides, dtype, like.device_code(),
                                                  like.get_device_index(), &result));
  return Tensor(result);
}
inline Tensor allocate(const Tensor& like, Sizes sizes) {
  return allocate(like, sizes, like.dtype_code());
}

}  // namespace baton::bindings
