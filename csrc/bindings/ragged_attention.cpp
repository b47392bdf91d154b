// ragged_attention: checks, the plan of work, and the CPU call.
#include "common/ragged_attention.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

void check_rows(const Checker& check, const RaggedAttentionParams& p, int64_t total_queries,
                std::optional<int64_t> max_query_length, std::optional<int64_t> max_length) {
  check.cumulative("cu_seqlens_q", p.cu_seqlens, p.num_rows + 1, total_queries, "total_queries");
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const int64_t query_length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("lengths", i, p.lengths[i], 0, p.sizes.capacity);
    check.in_range("starts", i, p.starts[i], 0, p.sizes.capacity - p.lengths[i]);
    if (max_query_length && query_length > *max_query_length) {
      check.fail("max_query_length", format("at least the longest query, ", query_length),
                 format(*max_query_length));
    }
    if (max_length && p.lengths[i] > *max_length) {
      check.fail("max_length", format("at least the longest row, ", p.lengths[i]),
                 format(*max_length));
    }
  }
}

// Items of all rows, the offsets of their partial results, and how many columns they read.
struct Plan {
  std::vector<AttentionItem> items;
  std::vector<int64_t> partial_offsets;
  int64_t partial_floats = 0;
  int64_t columns = 0;
};

Plan make_plan(const RaggedAttentionParams& p) {
  Plan plan;
  plan.partial_offsets.assign(p.num_rows, -1);
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  for (int32_t row = 0; row < p.num_rows; ++row) {
    const int64_t query_length = p.cu_seqlens[row + 1] - p.cu_seqlens[row];
    const AttentionRowPlan own = plan_attention_row(query_length, p.lengths[row], group);
    plan.columns += own.num_tiles * p.lengths[row];
    if (own.num_splits > 1) {
      plan.partial_offsets[row] = plan.partial_floats;
      plan.partial_floats +=
          query_length * p.num_heads * own.num_splits * attention_partial_size(p.sizes.head_dim);
    }
    for (int32_t head = 0; head < p.sizes.num_kv_heads; ++head) {
      // The last tile of a causal row is its longest: first, so that no thread ends with it.
      for (int32_t tile = static_cast<int32_t>(own.num_tiles) - 1; tile >= 0; --tile) {
        for (int32_t split = 0; split < own.num_splits; ++split) {
          plan.items.push_back({row, head, tile, split});
        }
      }
    }
  }
  return plan;
}

}  // namespace

std::tuple<Tensor, Tensor> ragged_attention(Tensor query, Tensor key_cache, Tensor value_cache,
                                            Tensor cu_seqlens_q, Tensor slots, Tensor starts,
                                            Tensor lengths, std::optional<double> scale,
                                            bool causal, std::optional<int64_t> window,
                                            double softcap, std::optional<Tensor> alibi_slopes,
                                            std::optional<Tensor> sinks, bool return_lse,
                                            std::optional<int64_t> max_query_length,
                                            std::optional<int64_t> max_length) {
  const Checker check("ragged_attention");
  RaggedAttentionParams p{};
  p.sizes = check.caches(key_cache, value_cache, false, false);
  p.dtype = check.floating("query", query);
  check.dtype_as("query", query, "key_cache", key_cache);
  check.dims("query", query, 3);
  const int64_t total_queries = query.size(0);
  p.num_heads = query.size(1);
  check.shape("query", query, {total_queries, p.num_heads, p.sizes.head_dim});
  check.last_contiguous("query", query);
  if (p.num_heads < 1 || p.num_heads % p.sizes.num_kv_heads != 0) {
    check.fail("num_heads", format("a multiple of num_kv_heads = ", p.sizes.num_kv_heads),
               format(p.num_heads));
  }
  if (scale && !std::isfinite(*scale)) check.fail("scale", "finite", format(*scale));
  if (!(softcap >= 0.0) || !std::isfinite(softcap)) {
    check.fail("softcap", "0 (none) or positive", format(softcap));
  }
  if (window && *window < 1) check.fail("window", "at least 1", format(*window));
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
  check_rows(check, p, total_queries, max_query_length, max_length);

  Tensor out = torch::stable::new_empty(query, {total_queries, p.num_heads, p.sizes.head_dim});
  Tensor lse = torch::stable::new_empty(query, {return_lse ? total_queries : 0, p.num_heads},
                                        ScalarType::Float);
  p.query = query.const_data_ptr();
  p.key_cache = key_cache.const_data_ptr();
  p.value_cache = value_cache.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
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

  const Plan plan = make_plan(p);
  Tensor partials = torch::stable::new_empty(query, {plan.partial_floats}, ScalarType::Float);
  const AttentionWork work{plan.items.data(), static_cast<int64_t>(plan.items.size()),
                           plan.partial_offsets.data(),
                           static_cast<float*>(partials.mutable_data_ptr())};
  const int64_t bytes =
      plan.columns * p.sizes.num_kv_heads * p.sizes.head_dim * size_of(p.dtype) * 2;
  const cpu::KernelTable& kernels = cpu::kernels();
  for_each_item(work.num_items, bytes,
                [&](int64_t begin, int64_t end) { kernels.ragged_attention(p, work, begin, end); });
  if (plan.partial_floats > 0) {
    for_each_item(p.num_rows, plan.partial_floats * 4, [&](int64_t begin, int64_t end) {
      kernels.ragged_attention_merge(p, work, begin, end);
    });
  }
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("ragged_attention", TORCH_BOX(&ragged_attention));
}

}  // namespace baton::bindings
