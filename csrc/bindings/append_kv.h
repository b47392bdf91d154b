// append_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/index_arguments.h"
#include "common/append_kv.h"

namespace baton::bindings {

inline void check_rotary(const Checker& check, const char* name, const Tensor& tensor,
                         const Tensor& key, int64_t num_rows, int64_t head_dim) {
  check.on_device(name, tensor);
  const int32_t dtype = tensor.dtype_code();
  if (dtype != kCodes.float32 && dtype != key.dtype_code()) {
    check.fail(name, format("float32 or ", name_of(key.scalar_type()), " as key"),
               name_of(tensor.scalar_type()));
  }
  const Sizes sizes = tensor.sizes();
  if (sizes.size() != 2 || sizes[0] != num_rows ||
      (sizes[1] != head_dim / 2 && sizes[1] != head_dim)) {
    check.fail(
        name,
        format("of shape [", num_rows, ", ", head_dim / 2, "] or [", num_rows, ", ", head_dim, "]"),
        shape_of(tensor));
  }
  check.last_contiguous(name, tensor);
}

// Returns the rotated query if one is given. Scales are given if the cache is an eight-bit one.
template <typename Device>
std::optional<Tensor> run_append_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                                    const Tensor& value_cache, const Tensor* key_scale,
                                    const Tensor* value_scale, const std::optional<Tensor>& slots,
                                    const Tensor& columns, const Tensor* query,
                                    const std::optional<Tensor>& cos,
                                    const std::optional<Tensor>& sin) {
  const Checker check("append_kv", Device::kType, key_cache);
  AppendKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, false, true, key_scale != nullptr);
  p.dtype = check.floating("key", key);
  p.cache_dtype = check.cache_dtype(key_cache);
  const char* first_name = key_scale ? "key" : "key_cache";
  const Tensor& first = key_scale ? key : key_cache;
  if (key_scale) p.scales = check.scales(*key_scale, *value_scale, key_cache, value_cache, true);
  check.dtype_as("key", key, first_name, first);
  check.dtype_as("value", value, first_name, first);
  check.dims("key", key, 3);
  p.num_rows = key.sizes()[0];
  check.shape("key", key, {p.num_rows, p.sizes.num_kv_heads, p.sizes.head_dim});
  check.shape("value", value, key.sizes());
  check.last_contiguous("key", key);
  check.last_contiguous("value", value);
  if (query) {
    check.dtype_as("query", *query, first_name, first);
    check.dims("query", *query, 3);
    p.num_heads = query->sizes()[1];
    check.shape("query", *query, {p.num_rows, p.num_heads, p.sizes.head_dim});
    check.last_contiguous("query", *query);
    check.fits_int32("num_heads", p.num_heads);
  }
  if (cos.has_value() != sin.has_value()) {
    check.fail("cos and sin", "given together", cos ? "only cos" : "only sin");
  }
  if (cos) {
    check_rotary(check, "cos", *cos, key, p.num_rows, p.sizes.head_dim);
    check_rotary(check, "sin", *sin, key, p.num_rows, p.sizes.head_dim);
    check.dtype_as("sin", *sin, "cos", *cos);
    check.shape("sin", *sin, cos->sizes());
  }
  IndexArguments<Device> indices(check, key_cache, p.num_rows);
  p.slots = indices.slots("slots", slots);
  p.columns = check.index("columns", columns, p.num_rows);
  check.written_apart({{"key_cache", extent_of(key_cache)},
                       {"value_cache", extent_of(value_cache)},
                       {"key_scale", extent_if(key_scale)},
                       {"value_scale", extent_if(value_scale)}},
                      {{"key", &key},
                       {"value", &value},
                       {"slots", if_given(slots)},
                       {"columns", &columns},
                       {"query", query},
                       {"cos", if_given(cos)},
                       {"sin", if_given(sin)}});
  Device::check_values(check, p);

  const Device device(check, key_cache);
  std::optional<Tensor> rotated;
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  if (query) {
    p.query = query->const_data_ptr();
    p.query_strides = token_strides(*query);
    rotated.emplace(allocate(key, query->sizes()));
    p.rotated_query = rotated->mutable_data_ptr();
  }
  p.rotary_dtype = p.dtype;
  if (cos) {
    p.cos = cos->const_data_ptr();
    p.sin = sin->const_data_ptr();
    p.rotary_dim = cos->sizes()[1];
    p.cos_row_stride = cos->strides()[0];
    p.sin_row_stride = sin->strides()[0];
    p.rotary_dtype = check.floating("cos", *cos);
  }
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
  return rotated;
}

template <typename Device>
void append_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
               const Tensor& value_cache, const std::optional<Tensor>& slots, const Tensor& columns,
               const std::optional<Tensor>& cos, const std::optional<Tensor>& sin) {
  run_append_kv<Device>(key, value, key_cache, value_cache, nullptr, nullptr, slots, columns,
                        nullptr, cos, sin);
}

template <typename Device>
Tensor append_kv_query(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                       const Tensor& value_cache, const std::optional<Tensor>& slots,
                       const Tensor& columns, const Tensor& query, const std::optional<Tensor>& cos,
                       const std::optional<Tensor>& sin) {
  return *run_append_kv<Device>(key, value, key_cache, value_cache, nullptr, nullptr, slots,
                                columns, &query, cos, sin);
}

template <typename Device>
void append_kv_scaled(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                      const Tensor& value_cache, const std::optional<Tensor>& slots,
                      const Tensor& columns, const std::optional<Tensor>& cos,
                      const std::optional<Tensor>& sin, const Tensor& key_scale,
                      const Tensor& value_scale) {
  run_append_kv<Device>(key, value, key_cache, value_cache, &key_scale, &value_scale, slots,
                        columns, nullptr, cos, sin);
}

template <typename Device>
Tensor append_kv_scaled_query(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                              const Tensor& value_cache, const std::optional<Tensor>& slots,
                              const Tensor& columns, const Tensor& query,
                              const std::optional<Tensor>& cos, const std::optional<Tensor>& sin,
                              const Tensor& key_scale, const Tensor& value_scale) {
  return *run_append_kv<Device>(key, value, key_cache, value_cache, &key_scale, &value_scale, slots,
                                columns, &query, cos, sin);
}

}  // namespace baton::bindings
