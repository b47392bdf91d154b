// masked_softmax: checks and the CPU call.
#include "common/masked_softmax.h"

#include <cmath>

#include "bindings/box.h"
#include "bindings/index_arguments.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

Tensor masked_softmax(const Tensor& scores, const std::optional<Tensor>& starts,
                      const Tensor& lengths, double scale, std::optional<int64_t> window) {
  const Checker check("masked_softmax");
  MaskedSoftmaxParams p{};
  p.dtype = check.floating("scores", scores);
  check.dims("scores", scores, 4);
  check.last_contiguous("scores", scores);
  const Sizes sizes = scores.sizes(), strides = scores.strides();
  p.num_rows = sizes[0];
  p.num_heads = sizes[1];
  p.query_length = sizes[2];
  p.key_length = sizes[3];
  IndexArguments<CpuDevice> indices(check, scores, p.num_rows);
  p.starts = indices.starts("starts", starts);
  p.lengths = check.index("lengths", lengths, p.num_rows);
  if (!std::isfinite(scale)) check.fail("scale", "finite", format(scale));
  if (window && *window < 1) check.fail("window", "at least 1", format(*window));
  for (int64_t i = 0; i < p.num_rows; ++i) {
    check.in_range("lengths", i, p.lengths[i], 0, p.key_length);
    check.in_range("starts", i, p.starts[i], 0, p.key_length - p.lengths[i]);
  }

  Tensor weights = allocate(scores, sizes);
  p.scores = scores.const_data_ptr();
  p.row_stride = strides[0];
  p.head_stride = strides[1];
  p.query_stride = strides[2];
  p.weights = weights.mutable_data_ptr();
  p.scale = static_cast<float>(scale);
  p.window = clamped_window(window);
  if (weights.numel() == 0) return weights;
  const auto& kernel = cpu::kernels().masked_softmax;
  for_each_item(
      masked_softmax_work(p), scores.numel() * size_of(p.dtype) * 2,
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 8);
  return weights;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("masked_softmax", box<&masked_softmax>);
}

}  // namespace baton::bindings
