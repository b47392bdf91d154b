// Ops with the schemas of baton_kernels that do nothing, through the same stable ABI: what remains
// of a call without checks and kernels. They take their tensors, allocate empty results, and
// return.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace {

namespace stable = torch::stable::detail;

constexpr int64_t kSizes[3] = {0, 1, 16}, kStrides[3] = {16, 16, 1};

// A result that an op allocates as baton_kernels does (bindings/tensors.h).
AtenTensorHandle new_result() {
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(3, kSizes, kStrides, aoti_torch_dtype_float32(),
                                                  aoti_torch_device_type_cpu(), 0, &result));
  return result;
}

// The first kTensors arguments are tensors; the options after them have their defaults.
template <int kTensors, int kResults>
void empty_op(StableIValue* stack, uint64_t, uint64_t) {
  AtenTensorHandle arguments[kTensors];
  for (int i = 0; i < kTensors; ++i) arguments[i] = stable::to<AtenTensorHandle>(stack[i]);
  for (AtenTensorHandle argument : arguments) aoti_torch_delete_tensor_object(argument);
  for (int i = 0; i < kResults; ++i) stack[i] = stable::from(new_result());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_empty, CPU, library) {
  library.impl("insert_kv", &empty_op<7, 0>);
  library.impl("append_kv", &empty_op<6, 0>);
  library.impl("move_kv", &empty_op<7, 0>);
  library.impl("extract_kv", &empty_op<5, 2>);
  library.impl("ragged_attention", &empty_op<7, 1>);
  library.impl("merge_attention", &empty_op<4, 2>);
  library.impl("attention_mask", &empty_op<2, 1>);
  library.impl("masked_softmax", &empty_op<3, 1>);
  library.impl("rms_norm", &empty_op<2, 1>);
  library.impl("silu_and_mul", &empty_op<1, 1>);
  library.impl("likeliest", &empty_op<1, 1>);
  library.impl("linear", &empty_op<2, 1>);
}
