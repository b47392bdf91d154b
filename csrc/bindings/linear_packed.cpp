// linear_packed, pack_linear and unpack_linear: checks and the CPU calls.
#include "common/linear_packed.h"

#include <climits>

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

// Up to so many rows memory is the limit: a panel is then one thread's, whole.
constexpr int64_t kRowsThatReadPanels = 8;
// Panels for each thread, below which parts of panels are shared out.
constexpr int64_t kPanelsPerThread = 4;

// [panels, in_features, 48], or [panels, pairs, 48, 2] of bfloat16.
void check_panels(const Checker& check, const Tensor& panels, Dtype dtype, int64_t out_features,
                  int64_t in_features) {
  const int64_t terms = panel_terms(dtype);
  const int64_t sizes[] = {num_panels(out_features), (in_features + terms - 1) / terms,
                           kPanelOutputs, terms};
  check.shape("panels", panels, Sizes(sizes, terms > 1 ? 4 : 3));
  check.contiguous("panels", panels);
}

void check_size(const Checker& check, const char* name, int64_t size) {
  if (size < 0 || size > INT64_MAX / 1024) check.fail(name, "a size", format(size));
}

}  // namespace

Tensor linear_packed(const Tensor& x, const Tensor& panels, int64_t out_features,
                     const std::optional<Tensor>& bias) {
  const Checker check("linear_packed");
  LinearPackedParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  check.last_contiguous("x", x);
  check.dtype_as("panels", panels, "x", x);
  check_size(check, "out_features", out_features);
  p.num_rows = x.sizes()[0];
  p.in_features = x.sizes()[1];
  p.out_features = out_features;
  check_panels(check, panels, p.dtype, out_features, p.in_features);
  if (bias) {
    check.dtype_as("bias", *bias, "x", x);
    check.shape("bias", *bias, {out_features});
    check.contiguous("bias", *bias);
  }

  Tensor y = allocate(x, {p.num_rows, out_features});
  if (y.numel() == 0) return y;
  p.x = x.const_data_ptr();
  p.panels = panels.const_data_ptr();
  p.bias = bias ? bias->const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr();
  p.x_row_stride = x.strides()[0];
  p.read_ahead = cpu::read_ahead_bytes();
  const cpu::KernelTable& kernels = cpu::kernels();
  p.parts = 1;
  if (p.num_rows > kRowsThatReadPanels &&
      linear_packed_work(p) < kPanelsPerThread * torch::stable::get_num_threads()) {
    p.parts = kernels.packed_parts;
  }
  for_each_item(
      linear_packed_work(p), panels.numel() * size_of(p.dtype),
      [&](int64_t begin, int64_t end) { kernels.linear_packed(p, begin, end); }, kNeighbors);
  return y;
}

void pack_linear(const Tensor& weight, const Tensor& panels) {
  const Checker check("pack_linear");
  PackLinearParams p{};
  p.dtype = check.floating("weight", weight);
  check.dims("weight", weight, 2);
  check.last_contiguous("weight", weight);
  check.dtype_as("panels", panels, "weight", weight);
  p.out_features = weight.sizes()[0];
  p.in_features = weight.sizes()[1];
  check_panels(check, panels, p.dtype, p.out_features, p.in_features);
  check.apart("panels", extent_of(panels), "weight", weight);

  if (panels.numel() == 0) return;
  p.weight = weight.const_data_ptr();
  p.panels = panels.mutable_data_ptr();
  p.weight_row_stride = weight.strides()[0];
  const cpu::KernelTable& kernels = cpu::kernels();
  for_each_item(num_panels(p.out_features), 2 * panels.numel() * size_of(p.dtype),
                [&](int64_t begin, int64_t end) { kernels.pack_linear(p, begin, end); });
}

Tensor unpack_linear(const Tensor& panels, int64_t out_features, int64_t in_features,
                     const std::optional<Tensor>& outputs) {
  const Checker check("unpack_linear");
  UnpackLinearParams p{};
  p.dtype = check.floating("panels", panels);
  check_size(check, "out_features", out_features);
  check_size(check, "in_features", in_features);
  check_panels(check, panels, p.dtype, out_features, in_features);
  p.num_outputs = out_features;
  if (outputs) {
    p.outputs = check.index("outputs", *outputs, -1);
    p.num_outputs = outputs->numel();
    for (int64_t i = 0; i < p.num_outputs; ++i) {
      check.in_range("outputs", i, p.outputs[i], 0, out_features - 1);
    }
  }

  Tensor weight = allocate(panels, {p.num_outputs, in_features});
  if (weight.numel() == 0) return weight;
  p.panels = panels.const_data_ptr();
  p.weight = weight.mutable_data_ptr();
  p.in_features = in_features;
  const cpu::KernelTable& kernels = cpu::kernels();
  for_each_item(
      p.num_outputs, 2 * weight.numel() * size_of(p.dtype),
      [&](int64_t begin, int64_t end) { kernels.unpack_linear(p, begin, end); }, kPanelOutputs);
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("linear_packed", box<&linear_packed>);
  library.impl("pack_linear", box<&pack_linear>);
  library.impl("unpack_linear", box<&unpack_linear>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("pack_linear", box_lazy<&pack_linear>);
}

}  // namespace baton::bindings
