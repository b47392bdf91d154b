// silu_and_mul: checks and the CPU call.
#include "common/silu_and_mul.h"

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

Tensor silu_and_mul(const Tensor& x) {
  const Checker check("silu_and_mul");
  SiluAndMulParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  const Sizes sizes = x.sizes();
  p.num_rows = sizes[0];
  if (sizes[1] % 2 != 0) check.fail("x", "of even width", shape_of(x));
  p.size = sizes[1] / 2;
  check.last_contiguous("x", x);

  Tensor y = allocate(x, {p.num_rows, p.size});
  p.x = x.const_data_ptr();
  p.x_row_stride = x.strides()[0];
  p.y = y.mutable_data_ptr();
  if (y.numel() == 0) return y;
  const auto& kernel = cpu::kernels().silu_and_mul;
  for_each_item(
      silu_and_mul_work(p), 2 * p.num_rows * p.size * size_of(p.dtype),
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 4);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("silu_and_mul", box<&silu_and_mul>);
}

}  // namespace baton::bindings
