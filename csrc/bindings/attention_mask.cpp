// attention_mask: checks and the CPU call.
#include "common/attention_mask.h"

#include "bindings/box.h"
#include "bindings/index_arguments.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

// Sets the elements that mean visible and hidden: true and false, or 0 and the dtype's lowest
// finite value. Returns the stable ABI's code of the dtype.
int32_t set_elements(const Checker& check, ScalarType dtype, AttentionMaskParams& p) {
  switch (dtype) {
    case ScalarType::Bool:
      p.element_size = 1;
      p.visible_bits = 1;
      p.hidden_bits = 0;
      return kCodes.boolean;
    case ScalarType::Float:
      p.element_size = 4;
      p.hidden_bits = 0xff7fffffu;
      return kCodes.float32;
    case ScalarType::Half:
      p.element_size = 2;
      p.hidden_bits = 0xfbffu;
      return kCodes.float16;
    case ScalarType::BFloat16:
      p.element_size = 2;
      p.hidden_bits = 0xff7fu;
      return kCodes.bfloat16;
    default:
      check.fail("dtype", "bool, float32, float16 or bfloat16", name_of(dtype));
  }
}

}  // namespace

Tensor attention_mask(const std::optional<Tensor>& starts, const Tensor& lengths,
                      int64_t query_length, int64_t key_length, ScalarType dtype,
                      std::optional<int64_t> window) {
  const Checker check("attention_mask");
  AttentionMaskParams p{};
  const int32_t code = set_elements(check, dtype, p);
  p.num_rows = count_rows({&starts}, lengths.numel());
  IndexArguments<CpuDevice> indices(check, lengths, p.num_rows);
  p.starts = indices.starts("starts", starts);
  p.lengths = check.index("lengths", lengths, p.num_rows);
  if (query_length < 0) check.fail("query_length", "at least 0", format(query_length));
  if (key_length < 0) check.fail("key_length", "at least 0", format(key_length));
  if (window && *window < 1) check.fail("window", "at least 1", format(*window));
  for (int64_t i = 0; i < p.num_rows; ++i) {
    check.in_range("lengths", i, p.lengths[i], 0, key_length);
    check.in_range("starts", i, p.starts[i], 0, key_length - p.lengths[i]);
  }

  Tensor mask = allocate(lengths, {p.num_rows, 1, query_length, key_length}, code);
  p.mask = mask.mutable_data_ptr();
  p.query_length = query_length;
  p.key_length = key_length;
  p.window = clamped_window(window);
  if (mask.numel() == 0) return mask;
  const auto& kernel = cpu::kernels().attention_mask;
  for_each_item(
      attention_mask_work(p), attention_mask_work(p) * key_length * p.element_size,
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 16);
  return mask;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("attention_mask", box<&attention_mask>);
}

}  // namespace baton::bindings
