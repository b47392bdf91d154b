// append_kv: checks and the CPU call.
#include "common/append_kv.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

void check_rotary(const Checker& check, const char* name, const Tensor& tensor, const Tensor& key,
                  int64_t num_rows, int64_t head_dim) {
  check.on_cpu(name, tensor);
  if (tensor.scalar_type() != ScalarType::Float && tensor.scalar_type() != key.scalar_type()) {
    check.fail(name, format("float32 or ", name_of(key.scalar_type()), " as key"),
               name_of(tensor.scalar_type()));
  }
  if (tensor.dim() != 2 || tensor.size(0) != num_rows ||
      (tensor.size(1) != head_dim / 2 && tensor.size(1) != head_dim)) {
    check.fail(
        name,
        format("of shape [", num_rows, ", ", head_dim / 2, "] or [", num_rows, ", ", head_dim, "]"),
        shape_of(tensor));
  }
  check.last_contiguous(name, tensor);
}

}  // namespace

Tensor append_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slots,
                 Tensor columns, std::optional<Tensor> query, std::optional<Tensor> cos,
                 std::optional<Tensor> sin) {
  const Checker check("append_kv");
  AppendKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, false, true);
  p.dtype = check.floating("key", key);
  check.dtype_as("key", key, "key_cache", key_cache);
  check.dtype_as("value", value, "key_cache", key_cache);
  check.dims("key", key, 3);
  p.num_rows = key.size(0);
  check.shape("key", key, {p.num_rows, p.sizes.num_kv_heads, p.sizes.head_dim});
  check.shape("value", value, {p.num_rows, p.sizes.num_kv_heads, p.sizes.head_dim});
  check.last_contiguous("key", key);
  check.last_contiguous("value", value);
  if (query) {
    check.dtype_as("query", *query, "key_cache", key_cache);
    check.dims("query", *query, 3);
    p.num_heads = query->size(1);
    check.shape("query", *query, {p.num_rows, p.num_heads, p.sizes.head_dim});
    check.last_contiguous("query", *query);
  }
  if (cos.has_value() != sin.has_value()) {
    check.fail("cos and sin", "given together", cos ? "only cos" : "only sin");
  }
  if (cos) {
    check_rotary(check, "cos", *cos, key, p.num_rows, p.sizes.head_dim);
    check_rotary(check, "sin", *sin, key, p.num_rows, p.sizes.head_dim);
    check.dtype_as("sin", *sin, "cos", *cos);
    check.shape("sin", *sin, {p.num_rows, cos->size(1)});
  }
  p.slots = check.index("slots", slots, p.num_rows);
  p.columns = check.index("columns", columns, p.num_rows);
  std::vector<ColumnRange> targets;
  targets.reserve(p.num_rows);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("columns", i, p.columns[i], 0, p.sizes.capacity - 1);
    targets.push_back({p.slots[i], static_cast<int32_t>(i), p.columns[i], p.columns[i] + 1});
  }
  if (const auto [a, b] = find_overlap(targets); a >= 0) {
    check.fail(
        "slots and columns", "distinct",
        format("rows ", a, " and ", b, " both in slot ", p.slots[a], ", column ", p.columns[a]));
  }

  Tensor rotated =
      query ? torch::stable::new_empty(*query, {p.num_rows, p.num_heads, p.sizes.head_dim})
            : torch::stable::new_empty(key, {0});
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  if (query) {
    p.query = query->const_data_ptr();
    p.query_strides = token_strides(*query);
    p.rotated_query = rotated.mutable_data_ptr();
  }
  p.rotary_dtype = p.dtype;
  if (cos) {
    p.cos = cos->const_data_ptr();
    p.sin = sin->const_data_ptr();
    p.rotary_dim = cos->size(1);
    p.cos_row_stride = cos->stride(0);
    p.sin_row_stride = sin->stride(0);
    p.rotary_dtype = check.floating("cos", *cos);
  }
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  const int64_t bytes =
      p.num_rows * (2 * p.sizes.num_kv_heads + p.num_heads) * p.sizes.head_dim * size_of(p.dtype);
  const auto& kernel = cpu::kernels().append_kv;
  for_each_item(
      append_kv_work(p), bytes, [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 4);
  return rotated;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("append_kv", TORCH_BOX(&append_kv));
}

}  // namespace baton::bindings
