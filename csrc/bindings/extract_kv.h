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
                                   IndexArguments<Device>& indices, bool has_scales = false) {
  ExtractKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, false, has_scales);
  p.dtype = p.cache_dtype = check.cache_dtype(key_cache);
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

// Writes into the given tensors. For an eight-bit cache, key and value are either floats or the
// stored elements, each head followed by its scale.
template <typename Device>
void extract_into(const Tensor& key_cache, const Tensor& value_cache, const Tensor* key_scale,
                  const Tensor* value_scale, const std::optional<Tensor>& cu_seqlens,
                  const std::optional<Tensor>& slots, const std::optional<Tensor>& starts,
                  int64_t total_tokens, const Tensor& key, const Tensor& value) {
  const Checker check("extract_kv", Device::kType, key_cache);
  IndexArguments<Device> indices(check, key_cache,
                                 count_rows(slots, starts, cu_seqlens, total_tokens));
  ExtractKvParams p =
      checked_extract_kv<Device>(check, key_cache, value_cache, cu_seqlens, slots, starts,
                                 total_tokens, indices, key_scale != nullptr);
  CacheSizes sizes = p.sizes;
  if (!key_scale) {
    check.dtype_as("out[0]", key, "key_cache", key_cache);
  } else {
    p.scales = check.scales(*key_scale, *value_scale, key_cache, value_cache, false);
    check.on_device("out[0]", key);
    if (key.dtype_code() == key_cache.dtype_code()) {
      sizes.head_dim += kScaleBytes;
    } else {
      p.dtype = check.floating("out[0]", key);
    }
  }
  check.dtype_as("out[1]", value, key_scale ? "out[0]" : "key_cache", key_scale ? key : key_cache);
  const TokenShape shape(sizes, total_tokens, key_cache.dim() - 1);
  for (const auto& [name, tensor] : {std::pair{"out[0]", &key}, {"out[1]", &value}}) {
    check.shape(name, *tensor, shape.sizes());
    check.last_contiguous(name, *tensor);
    check.not_expanded(name, *tensor);
  }
  check.interleaved("out[1]", value, "out[0]", key);
  check.written_apart({{"out[0]", extent_of(key)}, {"out[1]", extent_of(value)}},
                      {{"key_cache", &key_cache},
                       {"value_cache", &value_cache},
                       {"key_scale", key_scale},
                       {"value_scale", value_scale},
                       {"cu_seqlens", if_given(cu_seqlens)},
                       {"slots", if_given(slots)},
                       {"starts", if_given(starts)}});
  const Device device(check, key_cache);
  p.reuses_memory = true;
  run_extract_kv(device, p, key_cache, value_cache, key, value);
}

template <typename Device>
void extract_kv_out(const Tensor& key_cache, const Tensor& value_cache,
                    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& slots,
                    const std::optional<Tensor>& starts, int64_t total_tokens, const Tensor& key,
                    const Tensor& value) {
  extract_into<Device>(key_cache, value_cache, nullptr, nullptr, cu_seqlens, slots, starts,
                       total_tokens, key, value);
}

template <typename Device>
void extract_kv_scaled_out(const Tensor& key_cache, const Tensor& value_cache,
                           const std::optional<Tensor>& cu_seqlens,
                           const std::optional<Tensor>& slots, const std::optional<Tensor>& starts,
                           int64_t total_tokens, const Tensor& key_scale, const Tensor& value_scale,
                           const Tensor& key, const Tensor& value) {
  extract_into<Device>(key_cache, value_cache, &key_scale, &value_scale, cu_seqlens, slots, starts,
                       total_tokens, key, value);
}

// The stable ABI's code of a float dtype; that of the cache if none is given.
inline int32_t code_of(const Checker& check, const std::optional<ScalarType>& dtype,
                       const Tensor& cache) {
  if (!dtype) return cache.dtype_code();
  switch (*dtype) {
    case ScalarType::Float:
      return kCodes.float32;
    case ScalarType::Half:
      return kCodes.float16;
    case ScalarType::BFloat16:
      return kCodes.bfloat16;
    default:
      check.fail("dtype", "float32, float16 or bfloat16", name_of(*dtype));
  }
}

template <typename Device>
std::tuple<Tensor, Tensor> extract_kv_scaled(
    const Tensor& key_cache, const Tensor& value_cache, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& slots, const std::optional<Tensor>& starts, int64_t total_tokens,
    const Tensor& key_scale, const Tensor& value_scale, std::optional<ScalarType> dtype) {
  const Checker check("extract_kv", Device::kType, key_cache);
  const int32_t code = code_of(check, dtype, key_cache);
  CacheSizes sizes = check.caches(key_cache, value_cache, true, false, true);
  if (total_tokens < 0) check.fail("total_tokens", "at least 0", format(total_tokens));
  check.fits_int32("total_tokens", total_tokens);
  if (!dtype) sizes.head_dim += kScaleBytes;
  const TokenShape shape(sizes, total_tokens, key_cache.dim() - 1);
  Tensor key = allocate(key_cache, shape.sizes(), code);
  Tensor value = allocate(key_cache, shape.sizes(), code);
  extract_kv_scaled_out<Device>(key_cache, value_cache, cu_seqlens, slots, starts, total_tokens,
                                key_scale, value_scale, key, value);
  return {std::move(key), std::move(value)};
}

}  // namespace baton::bindings
