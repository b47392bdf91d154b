// linear_packed, pack_linear, unpack_linear and quantize_linear: checks and the CPU calls.
#include "common/linear_packed.h"

#include <climits>

#include "bindings/box.h"
#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

// Up to this many rows, memory bandwidth is the limit: each panel then goes to one thread whole.
constexpr int64_t kRowsThatReadPanels = 8;
// With fewer panels per thread than this, parts of panels are shared out.
constexpr int64_t kPanelsPerThread = 4;

// [panels, in_features, 48], [panels, pairs, 48, 2] of bfloat16 or [panels, fours, 48, 4] of int8.
void check_panels(const Checker& check, const Tensor& panels, const PanelLayout& layout,
                  int64_t out_features, int64_t in_features) {
  const int64_t terms = layout.terms;
  const int64_t sizes[] = {num_panels(out_features), (in_features + terms - 1) / terms,
                           kPanelOutputs, terms};
  check.shape("panels", panels, Sizes(sizes, terms > 1 ? 4 : 3));
  check.contiguous("panels", panels);
}

// The layout of a weight's panels, or of panels, from the tensor's dtype.
PanelLayout check_layout(const Checker& check, const char* name, const Tensor& tensor) {
  check.on_device(name, tensor);
  const int32_t code = tensor.dtype_code();
  if (code == kCodes.int8) return kInt8Panels;
  if (code != kCodes.float32 && code != kCodes.float16 && code != kCodes.bfloat16) {
    check.fail(name, "float32, float16, bfloat16 or int8", name_of(tensor.scalar_type()));
  }
  return panel_layout(check.floating(name, tensor));
}

void check_size(const Checker& check, const char* name, int64_t size) {
  if (size < 0 || size > INT64_MAX / 1024) check.fail(name, "a size", format(size));
}

void check_scales(const Checker& check, const Tensor& scales, int64_t out_features) {
  check.float32("scales", scales);
  check.shape("scales", scales, {out_features});
  check.contiguous("scales", scales);
}

// Rows of x rounded to int8, kept alive while a kernel reads them.
class Int8Rows {
 public:
  Int8Rows(const Tensor& x, const LinearPackedParams& p)
      : stride_(int8_row_stride(p.in_features)),
        memory_(allocate(x,
                         {p.num_rows, stride_ + num_int8_groups(p.in_features) *
                                                    static_cast<int64_t>(sizeof(QuantizedGroup))},
                         kCodes.int8)) {
    QuantizeLinearParams q{};
    q.dtype = p.dtype;
    q.x = x.const_data_ptr();
    q.x_row_stride = x.strides()[0];
    q.num_rows = p.num_rows;
    q.in_features = p.in_features;
    q.rounded = static_cast<int8_t*>(memory_.mutable_data_ptr());
    q.row_size = int8_row_size(p.in_features);
    q.rounded_row_stride = stride_;
    // Behind all rows, each of which is a whole number of cache lines.
    q.groups = reinterpret_cast<QuantizedGroup*>(q.rounded + p.num_rows * stride_);
    const auto& kernel = cpu::kernels().quantize_linear;
    for_each_item(
        p.num_rows, x.numel() * size_of(p.dtype),
        [&](int64_t begin, int64_t end) { kernel(q, begin, end); }, 8);
  }

  void give_to(LinearPackedParams& p) const {
    p.x = memory_.const_data_ptr();
    p.x_row_stride = stride_;
    p.x_groups = reinterpret_cast<const QuantizedGroup*>(static_cast<const char*>(p.x) +
                                                         p.num_rows * stride_);
  }

 private:
  int64_t stride_;
  Tensor memory_;
};

// scales: those of int8 panels, else null.
Tensor run_linear_packed(const Tensor& x, const Tensor& panels, const Tensor* scales,
                         int64_t out_features, const std::optional<Tensor>& bias) {
  const Checker check("linear_packed");
  LinearPackedParams p{};
  p.dtype = check.floating("x", x);
  check.dims("x", x, 2);
  check.last_contiguous("x", x);
  check_size(check, "out_features", out_features);
  p.num_rows = x.sizes()[0];
  p.in_features = x.sizes()[1];
  p.out_features = out_features;
  if (scales) {
    check.int8("panels", panels);
    check_panels(check, panels, kInt8Panels, out_features, p.in_features);
    check_scales(check, *scales, out_features);
  } else {
    check.dtype_as("panels", panels, "x", x);
    check_panels(check, panels, panel_layout(p.dtype), out_features, p.in_features);
  }
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
  std::optional<Int8Rows> rows;
  if (scales) {
    rows.emplace(x, p).give_to(p);
    p.weight_scales = static_cast<const float*>(scales->const_data_ptr());
  }
  p.read_ahead = cpu::read_ahead_bytes();
  const cpu::KernelTable& kernels = cpu::kernels();
  p.parts = 1;
  if (p.num_rows > kRowsThatReadPanels &&
      linear_packed_work(p) < kPanelsPerThread * torch::stable::get_num_threads()) {
    p.parts = kernels.packed_parts;
  }
  const auto& kernel = scales ? kernels.linear_packed_int8 : kernels.linear_packed;
  for_each_item(
      linear_packed_work(p), panels.numel() * (scales ? 1 : size_of(p.dtype)),
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, kNeighbors);
  return y;
}

}  // namespace

Tensor linear_packed(const Tensor& x, const Tensor& panels, int64_t out_features,
                     const std::optional<Tensor>& bias) {
  return run_linear_packed(x, panels, nullptr, out_features, bias);
}

Tensor linear_packed_int8(const Tensor& x, const Tensor& panels, const Tensor& scales,
                          int64_t out_features, const std::optional<Tensor>& bias) {
  return run_linear_packed(x, panels, &scales, out_features, bias);
}

std::tuple<Tensor, Tensor> quantize_linear(const Tensor& weight) {
  const Checker check("quantize_linear");
  QuantizeLinearParams p{};
  p.dtype = check.floating("weight", weight);
  check.dims("weight", weight, 2);
  check.last_contiguous("weight", weight);
  p.num_rows = weight.sizes()[0];
  p.in_features = weight.sizes()[1];

  Tensor rounded = allocate(weight, {p.num_rows, p.in_features}, kCodes.int8);
  Tensor scales = allocate(weight, {p.num_rows}, kCodes.float32);
  p.x = weight.const_data_ptr();
  p.x_row_stride = weight.strides()[0];
  p.rounded = static_cast<int8_t*>(rounded.mutable_data_ptr());
  p.row_size = p.rounded_row_stride = p.in_features;
  p.scales = static_cast<float*>(scales.mutable_data_ptr());
  const auto& kernel = cpu::kernels().quantize_linear;
  for_each_item(
      p.num_rows, weight.numel() * size_of(p.dtype),
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, kPanelOutputs);
  return {std::move(rounded), std::move(scales)};
}

void pack_linear(const Tensor& weight, const Tensor& panels) {
  const Checker check("pack_linear");
  PackLinearParams p{};
  p.layout = check_layout(check, "weight", weight);
  check.dims("weight", weight, 2);
  check.last_contiguous("weight", weight);
  check.dtype_as("panels", panels, "weight", weight);
  p.out_features = weight.sizes()[0];
  p.in_features = weight.sizes()[1];
  check_panels(check, panels, p.layout, p.out_features, p.in_features);
  check.apart("panels", extent_of(panels), "weight", weight);

  if (panels.numel() == 0) return;
  p.weight = weight.const_data_ptr();
  p.panels = panels.mutable_data_ptr();
  p.weight_row_stride = weight.strides()[0];
  const cpu::KernelTable& kernels = cpu::kernels();
  for_each_item(num_panels(p.out_features), 2 * panels.numel() * p.layout.element_bytes,
                [&](int64_t begin, int64_t end) { kernels.pack_linear(p, begin, end); });
}

Tensor unpack_linear(const Tensor& panels, int64_t out_features, int64_t in_features,
                     const std::optional<Tensor>& outputs) {
  const Checker check("unpack_linear");
  UnpackLinearParams p{};
  p.layout = check_layout(check, "panels", panels);
  check_size(check, "out_features", out_features);
  check_size(check, "in_features", in_features);
  check_panels(check, panels, p.layout, out_features, in_features);
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
      p.num_outputs, 2 * weight.numel() * p.layout.element_bytes,
      [&](int64_t begin, int64_t end) { kernels.unpack_linear(p, begin, end); }, kPanelOutputs);
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("linear_packed", box<&linear_packed>);
  library.impl("linear_packed.int8", box<&linear_packed_int8>);
  library.impl("quantize_linear", box<&quantize_linear>);
  library.impl("pack_linear", box<&pack_linear>);
  library.impl("unpack_linear", box<&unpack_linear>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("pack_linear", box_lazy<&pack_linear>);
}

}  // namespace baton::bindings
