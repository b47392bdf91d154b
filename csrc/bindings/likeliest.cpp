// likeliest: checks and the CPU call.
#include "common/likeliest.h"

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

Tensor likeliest(const Tensor& logits) {
  const Checker check("likeliest");
  LikeliestParams p{};
  p.dtype = check.floating("logits", logits);
  check.dims("logits", logits, 2);
  p.num_rows = logits.sizes()[0];
  p.size = logits.sizes()[1];
  if (p.size < 1) check.fail("logits", "at least 1 wide", shape_of(logits));
  check.last_contiguous("logits", logits);

  Tensor tokens = allocate(logits, {p.num_rows}, kCodes.int64);
  p.logits = logits.const_data_ptr();
  p.row_stride = logits.strides()[0];
  p.tokens = static_cast<int64_t*>(tokens.mutable_data_ptr());
  const auto& kernel = cpu::kernels().likeliest;
  for_each_item(likeliest_work(p), p.num_rows * p.size * size_of(p.dtype),
                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return tokens;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("likeliest", box<&likeliest>);
}

}  // namespace baton::bindings
