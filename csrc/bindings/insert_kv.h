// insert_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/checks.h"
#include "common/insert_kv.h"

namespace baton::bindings {

template <typename Device>
void insert_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens,
               Tensor slots, Tensor starts, bool zero_padding) {
  const Checker check("insert_kv", Device::kType, key_cache);
  InsertKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, true);
  p.dtype = check.floating("key", key);
  check.dtype_as("key", key, "key_cache", key_cache);
  check.dtype_as("value", value, "key_cache", key_cache);
  check.dims("key", key, key_cache.dim() - 1);
  p.total_tokens = key.size(key.dim() - 3);
  check.fits_int32("total_tokens", p.total_tokens);
  std::vector<int64_t> expected{p.total_tokens, p.sizes.num_kv_heads, p.sizes.head_dim};
  if (key.dim() == 4) expected.insert(expected.begin(), p.sizes.num_layers);
  check.shape("key", key, expected);
  check.shape("value", value, expected);
  check.last_contiguous("key", key);
  check.last_contiguous("value", value);
  p.slots = check.index("slots", slots, -1);
  p.num_queries = slots.numel();
  p.starts = check.index("starts", starts, p.num_queries);
  p.cu_seqlens = check.index("cu_seqlens", cu_seqlens, p.num_queries + 1);
  p.zero_padding = zero_padding;
  Device::check_values(check, p);

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

}  // namespace baton::bindings
