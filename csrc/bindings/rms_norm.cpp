// rms_norm: checks and the CPU call.
#include "common/rms_norm.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps,
                                    std::optional<Tensor> residual) {
  const Checker check("rms_norm");
  RmsNormParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  p.num_rows = x.size(0);
  p.size = x.size(1);
  if (p.size < 1) check.fail("x", "at least 1 wide", shape_of(x));
  check.last_contiguous("x", x);
  check.dtype_as("weight", weight, "x", x);
  check.shape("weight", weight, {p.size});
  check.contiguous("weight", weight);
  if (residual) {
    check.dtype_as("residual", *residual, "x", x);
    check.shape("residual", *residual, {p.num_rows, p.size});
    check.last_contiguous("residual", *residual);
  }
  if (!(eps >= 0.0)) check.fail("eps", "at least 0", format(eps));

  Tensor y = torch::stable::new_empty(x, {p.num_rows, p.size});
  Tensor sum = residual ? torch::stable::new_empty(x, {p.num_rows, p.size})
                        : torch::stable::new_empty(x, {0});
  p.x = x.const_data_ptr();
  p.x_row_stride = x.stride(0);
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (residual) {
    p.residual = residual->const_data_ptr();
    p.residual_row_stride = residual->stride(0);
    p.sum = sum.mutable_data_ptr();
  }
  p.eps = static_cast<float>(eps);
  const auto& kernel = cpu::kernels().rms_norm;
  for_each_item(
      rms_norm_work(p), x.numel() * size_of(p.dtype) * (residual ? 4 : 2),
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 8);
  return {y, sum};
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
}

}  // namespace baton::bindings
