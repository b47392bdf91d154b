// insert_kv: checks and the CPU call.
#include "common/insert_kv.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

void insert_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor cu_seqlens,
               Tensor slots, Tensor starts, bool zero_padding) {
  const Checker check("insert_kv");
  InsertKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, true);
  p.dtype = check.floating("key", key);
  check.dtype_as("key", key, "key_cache", key_cache);
  check.dtype_as("value", value, "key_cache", key_cache);
  check.dims("key", key, key_cache.dim() - 1);
  const int64_t total_tokens = key.size(key.dim() - 3);
  std::vector<int64_t> expected{total_tokens, p.sizes.num_kv_heads, p.sizes.head_dim};
  if (key.dim() == 4) expected.insert(expected.begin(), p.sizes.num_layers);
  check.shape("key", key, expected);
  check.shape("value", value, expected);
  check.last_contiguous("key", key);
  check.last_contiguous("value", value);
  p.slots = check.index("slots", slots, -1);
  p.num_queries = slots.numel();
  p.starts = check.index("starts", starts, p.num_queries);
  p.cu_seqlens = check.index("cu_seqlens", cu_seqlens, p.num_queries + 1);
  check.cumulative("cu_seqlens", p.cu_seqlens, p.num_queries + 1, total_tokens, "total_tokens");

  std::vector<ColumnRange> targets;
  for (int64_t i = 0; i < p.num_queries; ++i) {
    const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("starts", i, p.starts[i], 0, p.sizes.capacity - length);
    // Clearing the padding writes it too.
    const int64_t first = zero_padding ? 0 : p.starts[i];
    targets.push_back({p.slots[i], static_cast<int32_t>(i), first, p.starts[i] + length});
  }
  if (const auto [a, b] = find_overlap(targets); a >= 0) {
    check.fail("slots and starts", "targets that do not overlap",
               format("queries ", a, " and ", b, " in slot ", p.slots[a]));
  }

  p.key = key.const_data_ptr();
  p.value = value.const_data_ptr();
  p.key_cache = key_cache.mutable_data_ptr();
  p.value_cache = value_cache.mutable_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  p.total_tokens = total_tokens;
  p.zero_padding = zero_padding;
  const auto& kernel = cpu::kernels().insert_kv;
  for_each_item(insert_kv_work(p), key.numel() * size_of(p.dtype) * 2,
                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("insert_kv", TORCH_BOX(&insert_kv));
}

}  // namespace baton::bindings
