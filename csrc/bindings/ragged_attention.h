// ragged_attention as torch calls it: checks, parameters, and the call of a device's kernels.
#pragma once

#include <cmath>

#include "bindings/checks.h"
#include "common/ragged_attention.h"

namespace baton::bindings {

// Returns out, with kLse also lse.
template <typename Device, bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attend(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
    const Tensor& cu_seqlens_q, const Tensor& slots, const Tensor& starts, const Tensor& lengths,
    std::optional<double> scale, bool causal, std::optional<int64_t> window, double softcap,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks,
    std::optional<int64_t> max_query_length, std::optional<int64_t> max_length) {
  const Checker check("ragged_attention", Device::kType, key_cache);
  RaggedAttentionParams p{};
  p.sizes = check.caches(key_cache, value_cache, false, false);
  p.dtype = check.floating("query", query);
  check.dtype_as("query", query, "key_cache", key_cache);
  check.dims("query", query, 3);
  p.total_queries = query.sizes()[0];
  p.num_heads = query.sizes()[1];
  check.shape("query", query, {p.total_queries, p.num_heads, p.sizes.head_dim});
  check.last_contiguous("query", query);
  check.fits_int32("total_queries", p.total_queries);
  if (p.num_heads < 1 || p.num_heads % p.sizes.num_kv_heads != 0) {
    check.fail("num_heads", format("a multiple of num_kv_heads = ", p.sizes.num_kv_heads),
               format(p.num_heads));
  }
  if (scale && !std::isfinite(*scale)) check.fail("scale", "finite", format(*scale));
  if (!(softcap >= 0.0) || !std::isfinite(softcap)) {
    check.fail("softcap", "0 (none) or positive", format(softcap));
  }
  if (window && *window < 1) check.fail("window", "at least 1", format(*window));
  for (const auto& [name, bound] :
       {std::pair{"max_query_length", max_query_length}, {"max_length", max_length}}) {
    if (bound && *bound < 0) check.fail(name, "at least 0", format(*bound));
  }
  for (const auto& [name, tensor] : {std::pair{"alibi_slopes", &alibi_slopes}, {"sinks", &sinks}}) {
    if (!*tensor) continue;
    check.float32(name, **tensor);
    check.shape(name, **tensor, {p.num_heads});
    check.contiguous(name, **tensor);
  }
  p.slots = check.index("slots", slots, -1);
  p.num_rows = slots.numel();
  p.starts = check.index("starts", starts, p.num_rows);
  p.lengths = check.index("lengths", lengths, p.num_rows);
  p.cu_seqlens = check.index("cu_seqlens_q", cu_seqlens_q, p.num_rows + 1);
  // No row exceeds what there is.
  p.max_query_length = max_query_length.value_or(p.total_queries);
  p.max_length = max_length.value_or(p.sizes.capacity);
  Device::check_values(check, p);

  const Device device(check, query);
  Tensor out = allocate(query, {p.total_queries, p.num_heads, p.sizes.head_dim});
  std::optional<Tensor> lse;
  if (kLse) {
    lse.emplace(allocate(query, {p.total_queries, p.num_heads}, kCodes.float32));
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  p.query = query.const_data_ptr();
  p.key_cache = key_cache.const_data_ptr();
  p.value_cache = value_cache.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.alibi_slopes =
      alibi_slopes ? static_cast<const float*>(alibi_slopes->const_data_ptr()) : nullptr;
  p.sinks = sinks ? static_cast<const float*>(sinks->const_data_ptr()) : nullptr;
  p.query_strides = token_strides(query);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  p.scale = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(double(p.sizes.head_dim)));
  p.softcap = static_cast<float>(softcap);
  p.window = window ? *window : 0;
  p.causal = causal;
  device.run(p, query);
  if constexpr (kLse) {
    return {std::move(out), std::move(*lse)};
  } else {
    return out;
  }
}

template <typename Device>
Tensor ragged_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                        const Tensor& cu_seqlens_q, const Tensor& slots, const Tensor& starts,
                        const Tensor& lengths) {
  return attend<Device, false>(query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths,
                               {}, true, {}, 0.0, {}, {}, {}, {});
}

}  // namespace baton::bindings
