// rms_norm: checks and the CPU call.
#include "common/rms_norm.h"

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

// Returns y and, with a residual, also the sum.
std::pair<Tensor, std::optional<Tensor>> run_rms_norm(const Tensor& x, const Tensor& weight,
                                                      double eps, const Tensor* residual) {
  const Checker check("rms_norm");
  RmsNormParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  const Sizes sizes = x.sizes();
  p.num_rows = sizes[0];
  p.size = sizes[1];
  if (p.size < 1) check.fail("x", "at least 1 wide", shape_of(x));
  check.last_contiguous("x", x);
  check.dtype_as("weight", weight, "x", x);
  check.shape("weight", weight, {p.size});
  check.contiguous("weight", weight);
  if (residual) {
    check.dtype_as("residual", *residual, "x", x);
    check.shape("residual", *residual, sizes);
    check.last_contiguous("residual", *residual);
  }
  if (!(eps >= 0.0)) check.fail("eps", "at least 0", format(eps));

  Tensor y = allocate(x, sizes);
  std::optional<Tensor> sum;
  p.x = x.const_data_ptr();
  p.x_row_stride = x.strides()[0];
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  if (residual) {
    p.residual = residual->const_data_ptr();
    p.residual_row_stride = residual->strides()[0];
    sum.emplace(allocate(x, sizes));
    p.sum = sum->mutable_data_ptr();
  }
  p.eps = static_cast<float>(eps);
  const auto& kernel = cpu::kernels().rms_norm;
  for_each_item(
      rms_norm_work(p), p.num_rows * p.size * size_of(p.dtype) * (residual ? 4 : 2),
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 8);
  return {std::move(y), std::move(sum)};
}

}  // namespace

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  return run_rms_norm(x, weight, eps, nullptr).first;
}

std::tuple<Tensor, Tensor> rms_norm_residual(const Tensor& x, const Tensor& weight, double eps,
                                             const Tensor& residual) {
  auto [y, sum] = run_rms_norm(x, weight, eps, &residual);
  return {std::move(y), std::move(*sum)};
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("rms_norm", box<&rms_norm>);
  library.impl("rms_norm.residual", box<&rms_norm_residual>);
}

}  // namespace baton::bindings
