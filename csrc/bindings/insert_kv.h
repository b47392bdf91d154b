// insert_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/index_arguments.h"
#include "common/insert_kv.h"

namespace baton::bindings {

// key_scale and value_scale are those of an eight-bit cache, else null.
template <typename Device>
void run_insert_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                   const Tensor& value_cache, const Tensor* key_scale, const Tensor* value_scale,
                   const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& slots,
                   const std::optional<Tensor>& starts, bool zero_padding) {
  const Checker check("insert_kv", Device::kType, key_cache);
  InsertKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, true, key_scale != nullptr);
  p.cache_dtype = check.cache_dtype(key_cache);
  int64_t head_bytes = p.sizes.head_dim;
  if (!key_scale) {
    p.dtype = check.floating("key", key);
    check.dtype_as("key", key, "key_cache", key_cache);
    check.dtype_as("value", value, "key_cache", key_cache);
  } else {
    p.scales = check.scales(*key_scale, *value_scale, key_cache, value_cache, true);
    check.on_device("key", key);
    const bool is_whole = key.dtype_code() == key_cache.dtype_code();
    p.dtype = is_whole ? p.cache_dtype : check.floating("key", key);
    if (is_whole) head_bytes += kScaleBytes;
    check.dtype_as("value", value, "key", key);
  }
  check.dims("key", key, key_cache.dim() - 1);
  const Sizes sizes = key.sizes();
  p.total_tokens = sizes[sizes.size() - 3];
  check.fits_int32("total_tokens", p.total_tokens);
  CacheSizes token_sizes = p.sizes;
  token_sizes.head_dim = head_bytes;
  check.shape("key", key, TokenShape(token_sizes, p.total_tokens, sizes.size()).sizes());
  check.shape("value", value, sizes);
  check.last_contiguous("key", key);
  check.last_contiguous("value", value);
  p.num_queries = count_rows(slots, starts, cu_seqlens, p.total_tokens);
  IndexArguments<Device> indices(check, key_cache, p.num_queries);
  p.slots = indices.slots("slots", slots);
  p.starts = indices.starts("starts", starts);
  p.cu_seqlens = indices.cu_seqlens("cu_seqlens", cu_seqlens, p.total_tokens);
  p.zero_padding = zero_padding;
  check.written_apart({{"key_cache", extent_of(key_cache)},
                       {"value_cache", extent_of(value_cache)},
                       {"key_scale", extent_if(key_scale)},
                       {"value_scale", extent_if(value_scale)}},
                      {{"key", &key},
                       {"value", &value},
                       {"cu_seqlens", if_given(cu_seqlens)},
                       {"slots", if_given(slots)},
                       {"starts", if_given(starts)}});
  Device::check_values(check, p);
  if (key_cache.numel() == 0) return;

  const Device device(check, key_cache);
  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
}

template <typename Device>
void insert_kv(const Tensor& key, const Tensor& value, const Tensor& key_cache,
               const Tensor& value_cache, const std::optional<Tensor>& cu_seqlens,
               const std::optional<Tensor>& slots, const std::optional<Tensor>& starts,
               bool zero_padding) {
  run_insert_kv<Device>(key, value, key_cache, value_cache, nullptr, nullptr, cu_seqlens, slots,
                        starts, zero_padding);
}

template <typename Device>
void insert_kv_scaled(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                      const Tensor& value_cache, const std::optional<Tensor>& cu_seqlens,
                      const std::optional<Tensor>& slots, const std::optional<Tensor>& starts,
                      bool zero_padding, const Tensor& key_scale, const Tensor& value_scale) {
  run_insert_kv<Device>(key, value, key_cache, value_cache, &key_scale, &value_scale, cu_seqlens,
                        slots, starts, zero_padding);
}

}  // namespace baton::bindings
