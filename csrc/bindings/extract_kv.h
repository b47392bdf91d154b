// extract_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/checks.h"
#include "common/extract_kv.h"

namespace baton::bindings {

template <typename Device>
std::tuple<Tensor, Tensor> extract_kv(const Tensor& key_cache, const Tensor& value_cache,
                                      const Tensor& cu_seqlens, const Tensor& slots,
                                      const Tensor& starts, int64_t total_tokens) {
  const Checker check("extract_kv", Device::kType, key_cache);
  ExtractKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, false);
  p.dtype = check.floating("key_cache", key_cache);
  if (total_tokens < 0) check.fail("total_tokens", "at least 0", format(total_tokens));
  check.fits_int32("total_tokens", total_tokens);
  p.total_tokens = total_tokens;
  p.slots = check.index("slots", slots, -1);
  p.num_queries = slots.numel();
  p.starts = check.index("starts", starts, p.num_queries);
  p.cu_seqlens = check.index("cu_seqlens", cu_seqlens, p.num_queries + 1);
  Device::check_values(check, p);

  const Device device(check, key_cache);
  const TokenShape shape(p.sizes, total_tokens, key_cache.dim() - 1);
  Tensor key = allocate(key_cache, shape.sizes());
  Tensor value = allocate(key_cache, shape.sizes());
  p.key_cache = key_cache.const_data_ptr();
  p.value_cache = value_cache.const_data_ptr();
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
  return {key, value};
}

}  // namespace baton::bindings
