// ragged_attention as torch calls it: checks, parameters, and the call of a device's kernels.
#pragma once

#include <cmath>

#include "bindings/index_arguments.h"
#include "common/ragged_attention.h"

namespace baton::bindings {

// The arguments of a call, as the schemas name them.
struct AttentionArguments {
  const Tensor &query, &key_cache, &value_cache;
  const std::optional<Tensor>&cu_seqlens_q, &slots, &starts;
  const Tensor& lengths;
  std::optional<double> scale;
  bool causal;
  std::optional<int64_t> window;
  double softcap;
  const std::optional<Tensor>&alibi_slopes, &sinks;
  std::optional<int64_t> max_query_length, max_length;
  const std::optional<Tensor>&block_table, &key_scale, &value_scale;
};

// A block table replaces slots, which are then ignored.
inline int64_t count_attention_rows(const AttentionArguments& a) {
  static const std::optional<Tensor> kNone;
  return count_rows({a.block_table ? &kNone : &a.slots, &a.starts}, a.lengths.numel());
}

// Checks a block table and sets the fields that replace slots.
inline void check_pages(const Checker& check, const AttentionArguments& a,
                        RaggedAttentionParams& p) {
  if (p.sizes.capacity < 1) {
    check.fail("key_cache", "of pages of at least one column with block_table",
               format("shape ", shape_of(a.key_cache)));
  }
  const Tensor& table = *a.block_table;
  p.block_table = check.index_rows("block_table", table, p.num_rows);
  // torch gives an empty table no memory, but null means that there is no table.
  static constexpr int32_t kNoPages = 0;
  if (table.numel() == 0) p.block_table = &kNoPages;
  p.block_table_stride = table.strides()[0];
  p.max_pages = table.sizes()[1];
}

// Checks and sets everything but the results.
template <typename Device>
RaggedAttentionParams checked_attention(const Checker& check, const AttentionArguments& a,
                                        IndexArguments<Device>& indices) {
  RaggedAttentionParams p{};
  if (a.key_scale.has_value() != a.value_scale.has_value()) {
    check.fail("key_scale and value_scale", "given together",
               a.key_scale ? "only key_scale" : "only value_scale");
  }
  p.sizes = check.caches(a.key_cache, a.value_cache, false, false, a.key_scale.has_value());
  p.dtype = check.floating("query", a.query);
  p.cache_dtype = check.cache_dtype(a.key_cache);
  if (a.key_scale) {
    p.scales = check.scales(*a.key_scale, *a.value_scale, a.key_cache, a.value_cache, false);
  } else {
    check.dtype_as("query", a.query, "key_cache", a.key_cache);
  }
  check.dims("query", a.query, 3);
  p.total_queries = a.query.sizes()[0];
  p.num_heads = a.query.sizes()[1];
  check.shape("query", a.query, {p.total_queries, p.num_heads, p.sizes.head_dim});
  check.last_contiguous("query", a.query);
  check.fits_int32("total_queries", p.total_queries);
  if (p.num_heads < 1 || p.num_heads % p.sizes.num_kv_heads != 0) {
    check.fail("num_heads", format("a multiple of num_kv_heads = ", p.sizes.num_kv_heads),
               format(p.num_heads));
  }
  if (a.scale && !std::isfinite(*a.scale)) check.fail("scale", "finite", format(*a.scale));
  if (!(a.softcap >= 0.0) || !std::isfinite(a.softcap)) {
    check.fail("softcap", "0 (none) or positive", format(a.softcap));
  }
  if (a.window && *a.window < 1) check.fail("window", "at least 1", format(*a.window));
  for (const auto& [name, bound] :
       {std::pair{"max_query_length", a.max_query_length}, {"max_length", a.max_length}}) {
    if (bound && *bound < 0) check.fail(name, "at least 0", format(*bound));
  }
  for (const auto& [name, tensor] :
       {std::pair{"alibi_slopes", &a.alibi_slopes}, {"sinks", &a.sinks}}) {
    if (!*tensor) continue;
    check.float32(name, **tensor);
    check.shape(name, **tensor, {p.num_heads});
    check.contiguous(name, **tensor);
  }
  p.num_rows = indices.num_rows();
  if (a.block_table) {
    check_pages(check, a, p);
  } else {
    p.slots = indices.slots("slots", a.slots);
  }
  p.starts = indices.starts("starts", a.starts);
  p.lengths = check.index("lengths", a.lengths, p.num_rows);
  p.cu_seqlens = indices.cu_seqlens("cu_seqlens_q", a.cu_seqlens_q, p.total_queries);
  // By default the bounds are the largest possible values.
  p.max_query_length = a.max_query_length.value_or(p.total_queries);
  p.max_length = a.max_length.value_or(attention_columns(p));
  Device::check_values(check, p);

  p.query = a.query.const_data_ptr();
  p.key_cache = a.key_cache.const_data_ptr();
  p.value_cache = a.value_cache.const_data_ptr();
  p.alibi_slopes =
      a.alibi_slopes ? static_cast<const float*>(a.alibi_slopes->const_data_ptr()) : nullptr;
  p.sinks = a.sinks ? static_cast<const float*>(a.sinks->const_data_ptr()) : nullptr;
  p.query_strides = token_strides(a.query);
  p.key_cache_strides = cache_strides(a.key_cache);
  p.value_cache_strides = cache_strides(a.value_cache);
  p.scale = static_cast<float>(a.scale ? *a.scale : 1.0 / std::sqrt(double(p.sizes.head_dim)));
  p.softcap = static_cast<float>(a.softcap);
  p.window = a.window ? *a.window : 0;
  p.causal = a.causal;
  return p;
}

// Checks an output tensor that the caller passed in.
inline void check_result(const Checker& check, const char* name, const Tensor& result, Sizes sizes,
                         const AttentionArguments& a) {
  check.shape(name, result, sizes);
  check.contiguous(name, result);
  // Messages name the output tensor: it is the one that a caller can move.
  const Extent extent = extent_of(result);
  for (const auto& [other_name, other] : {NamedTensor{"query", &a.query},
                                          {"key_cache", &a.key_cache},
                                          {"value_cache", &a.value_cache},
                                          {"cu_seqlens_q", if_given(a.cu_seqlens_q)},
                                          {"slots", a.block_table ? nullptr : if_given(a.slots)},
                                          {"starts", if_given(a.starts)},
                                          {"lengths", &a.lengths},
                                          {"alibi_slopes", if_given(a.alibi_slopes)},
                                          {"sinks", if_given(a.sinks)},
                                          {"block_table", if_given(a.block_table)},
                                          {"key_scale", if_given(a.key_scale)},
                                          {"value_scale", if_given(a.value_scale)}}) {
    if (other) check.apart(name, extent, other_name, *other);
  }
}

// Writes out, and lse if there is one.
template <typename Device>
void attend_into(const AttentionArguments& a, const Tensor& out, const Tensor* lse) {
  const Checker check("ragged_attention", Device::kType, a.key_cache);
  IndexArguments<Device> indices(check, a.key_cache, count_attention_rows(a));
  RaggedAttentionParams p = checked_attention<Device>(check, a, indices);
  check.dtype_as("out", out, "query", a.query);
  check_result(check, "out", out, {p.total_queries, p.num_heads, p.sizes.head_dim}, a);
  if (lse) {
    check.float32("lse", *lse);
    check_result(check, "lse", *lse, {p.total_queries, p.num_heads}, a);
    check.apart("lse", extent_of(*lse), "out", out);
    p.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  const Device device(check, a.query);
  p.out = out.mutable_data_ptr();
  device.run(p, a.query);
}

// Returns out, with kLse also lse.
template <typename Device, bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attend(const AttentionArguments& a) {
  const Checker check("ragged_attention", Device::kType, a.key_cache);
  IndexArguments<Device> indices(check, a.key_cache, count_attention_rows(a));
  RaggedAttentionParams p = checked_attention<Device>(check, a, indices);
  const Device device(check, a.query);
  Tensor out = allocate(a.query, {p.total_queries, p.num_heads, p.sizes.head_dim});
  p.out = out.mutable_data_ptr();
  if constexpr (kLse) {
    Tensor lse = allocate(a.query, {p.total_queries, p.num_heads}, kCodes.float32);
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    device.run(p, a.query);
    return {std::move(out), std::move(lse)};
  } else {
    device.run(p, a.query);
    return out;
  }
}

// The overloads, in the order of their schemas.
template <typename Device>
struct RaggedAttention {
  using Indices = const std::optional<Tensor>&;
  using Options = const std::optional<Tensor>&;
  using Bound = std::optional<int64_t>;

  static Tensor plain(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      Indices cu_seqlens_q, Indices slots, Indices starts, const Tensor& lengths) {
    return attend<Device, false>({query,
                                  key_cache,
                                  value_cache,
                                  cu_seqlens_q,
                                  slots,
                                  starts,
                                  lengths,
                                  {},
                                  true,
                                  {},
                                  0.0,
                                  kNone,
                                  kNone,
                                  {},
                                  {},
                                  kNone,
                                  kNone,
                                  kNone});
  }

  template <bool kLse>
  static auto options(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      Indices cu_seqlens_q, Indices slots, Indices starts, const Tensor& lengths,
                      std::optional<double> scale, bool causal, Bound window, double softcap,
                      Options alibi_slopes, Options sinks, Bound max_query_length, Bound max_length,
                      Indices block_table, Options key_scale, Options value_scale) {
    return attend<Device, kLse>({query, key_cache, value_cache, cu_seqlens_q, slots, starts,
                                 lengths, scale, causal, window, softcap, alibi_slopes, sinks,
                                 max_query_length, max_length, block_table, key_scale,
                                 value_scale});
  }

  static void out(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                  Indices cu_seqlens_q, Indices slots, Indices starts, const Tensor& lengths,
                  std::optional<double> scale, bool causal, Bound window, double softcap,
                  Options alibi_slopes, Options sinks, Bound max_query_length, Bound max_length,
                  Indices block_table, Options key_scale, Options value_scale, const Tensor& out) {
    attend_into<Device>({query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, scale,
                         causal, window, softcap, alibi_slopes, sinks, max_query_length, max_length,
                         block_table, key_scale, value_scale},
                        out, nullptr);
  }

  static void lse_out(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      Indices cu_seqlens_q, Indices slots, Indices starts, const Tensor& lengths,
                      std::optional<double> scale, bool causal, Bound window, double softcap,
                      Options alibi_slopes, Options sinks, Bound max_query_length, Bound max_length,
                      Indices block_table, Options key_scale, Options value_scale,
                      const Tensor& out, const Tensor& lse) {
    attend_into<Device>({query, key_cache, value_cache, cu_seqlens_q, slots, starts, lengths, scale,
                         causal, window, softcap, alibi_slopes, sinks, max_query_length, max_length,
                         block_table, key_scale, value_scale},
                        out, &lse);
  }

 private:
  static inline const std::optional<Tensor> kNone;
};

}  // namespace baton::bindings
