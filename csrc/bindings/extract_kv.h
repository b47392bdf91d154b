// extract_kv as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/index_arguments.h"
#include "common/extract_kv.h"

namespace baton::bindings {

template <typename Device>
ExtractKvParams checked_extract_kv(const Checker& check, const Tensor& key_cache,
                                   const Tensor& value_cache,
                                   const std::optional<Tensor>& cu_seqlens,
                                   const std::optional<Tensor>& slots,
                                   const std::optional<Tensor>& starts, int64_t total_tokens,
                                   IndexArguments<Device>& indices) {
  ExtractKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, false);
  p.dtype = check.floating("key_cache", key_cache);
  if (total_tokens < 0) check.fail("total_tokens", "at least 0", format(total_tokens));
  check.fits_int32("total_tokens", total_tokens);
  p.total_tokens = total_tokens;
  p.num_queries = indices.num_rows();
  p.slots = indices.slots("slots", slots);
  p.starts = indices.starts("starts", starts);
  p.cu_seqlens = indices.cu_seqlens("cu_seqlens", cu_seqlens, total_tokens);
  Device::check_values(check, p);
  return p;
}

template <typename Device>
void run_extract_kv(const Device& device, ExtractKvParams& p, const Tensor& key_cache,
                    const Tensor& value_cache, const Tensor& key, const Tensor& value) {
  p.key_cache = key_cache.const_data_ptr();
  p.value_cache = value_cache.const_data_ptr();
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  device.run(p, key_cache);
}

template <typename Device>
std::tuple<Tensor, Tensor> extract_kv(const Tensor& key_cache, const Tensor& value_cache,
                                      const std::optional<Tensor>& cu_seqlens,
                                      const std::optional<Tensor>& slots,
                                      const std::optional<Tensor>& starts, int64_t total_tokens) {
  const Checker check("extract_kv", Device::kType, key_cache);
  IndexArguments<Device> indices(check, key_cache,
                                 count_rows(slots, starts, cu_seqlens, total_tokens));
  ExtractKvParams p = checked_extract_kv<Device>(check, key_cache, value_cache, cu_seqlens, slots,
                                                 starts, total_tokens, indices);
  const Device device(check, key_cache);
  const TokenShape shape(p.sizes, total_tokens, key_cache.dim() - 1);
  Tensor key = allocate(key_cache, shape.sizes());
  Tensor value = allocate(key_cache, shape.sizes());
  run_extract_kv(device, p, key_cache, value_cache, key, value);
  return {std::move(key), std::move(value)};
}

template <typename Device>
void extract_kv_out(const Tensor& key_cache, const Tensor& value_cache,
                    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& slots,
                    const std::optional<Tensor>& starts, int64_t total_tokens, const Tensor& key,
                    const Tensor& value) {
  const Checker check("extract_kv", Device::kType, key_cache);
  IndexArguments<Device> indices(check, key_cache,
                                 count_rows(slots, starts, cu_seqlens, total_tokens));
  ExtractKvParams p = checked_extract_kv<Device>(check, key_cache, value_cache, cu_seqlens, slots,
                                                 starts, total_tokens, indices);
  const TokenShape shape(p.sizes, total_tokens, key_cache.dim() - 1);
  for (const auto& [name, tensor] : {std::pair{"out[0]", &key}, {"out[1]", &value}}) {
    check.dtype_as(name, *tensor, "key_cache", key_cache);
    check.shape(name, *tensor, shape.sizes());
    check.last_contiguous(name, *tensor);
    check.not_expanded(name, *tensor);
  }
  check.interleaved("out[1]", value, "out[0]", key);
  check.written_apart({{"out[0]", extent_of(key)}, {"out[1]", extent_of(value)}},
                      {{"key_cache", &key_cache},
                       {"value_cache", &value_cache},
                       {"cu_seqlens", if_given(cu_seqlens)},
                       {"slots", if_given(slots)},
                       {"starts", if_given(starts)}});
  const Device device(check, key_cache);
  p.reuses_memory = true;
  run_extract_kv(device, p, key_cache, value_cache, key, value);
}

}  // namespace baton::bindings
