// linear: checks and the CPU call.
#include "common/linear.h"

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const Checker check("linear");
  LinearParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  check.last_contiguous("x", x);
  check.dtype_as("weight", weight, "x", x);
  check.dims("weight", weight, 2);
  check.last_contiguous("weight", weight);
  p.num_rows = x.sizes()[0];
  p.in_features = x.sizes()[1];
  p.out_features = weight.sizes()[0];
  check.shape("weight", weight, {p.out_features, p.in_features});
  if (bias) {
    check.dtype_as("bias", *bias, "x", x);
    check.shape("bias", *bias, {p.out_features});
    check.contiguous("bias", *bias);
  }

  Tensor y = allocate(x, {p.num_rows, p.out_features});
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_row_stride = x.strides()[0];
  p.weight_row_stride = weight.strides()[0];
  const cpu::KernelTable& kernels = cpu::kernels();
  // Kept alive while the kernel reads it.
  std::optional<Tensor> packed;
  if (kernels.packs_bfloat16 && p.dtype == Dtype::kBFloat16 && linear_work(p) > 0) {
    const int64_t tiles = linear_row_tiles(p);
    packed.emplace(allocate(x, {tiles * linear_packed_size(p)}, kCodes.float32));
    p.packed_x = static_cast<float*>(packed->mutable_data_ptr());
    for_each_item(tiles, x.numel() * size_of(p.dtype),
                  [&](int64_t begin, int64_t end) { kernels.linear_pack(p, begin, end); });
  }
  for_each_item(
      linear_work(p), weight.numel() * size_of(p.dtype),
      [&](int64_t begin, int64_t end) { kernels.linear(p, begin, end); }, kNeighbors);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) { library.impl("linear", box<&linear>); }

}  // namespace baton::bindings
