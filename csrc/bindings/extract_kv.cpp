// extract_kv: checks and the CPU call.
#include "common/extract_kv.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

std::tuple<Tensor, Tensor> extract_kv(Tensor key_cache, Tensor value_cache, Tensor cu_seqlens,
                                      Tensor slots, Tensor starts, int64_t total_tokens) {
  const Checker check("extract_kv");
  ExtractKvParams p{};
  p.sizes = check.caches(key_cache, value_cache, true, false);
  p.dtype = check.floating("key_cache", key_cache);
  if (total_tokens < 0) check.fail("total_tokens", "at least 0", format(total_tokens));
  p.slots = check.index("slots", slots, -1);
  p.num_queries = slots.numel();
  p.starts = check.index("starts", starts, p.num_queries);
  p.cu_seqlens = check.index("cu_seqlens", cu_seqlens, p.num_queries + 1);
  check.cumulative("cu_seqlens", p.cu_seqlens, p.num_queries + 1, total_tokens, "total_tokens");
  for (int64_t i = 0; i < p.num_queries; ++i) {
    const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("starts", i, p.starts[i], 0, p.sizes.capacity - length);
  }

  std::vector<int64_t> sizes{total_tokens, p.sizes.num_kv_heads, p.sizes.head_dim};
  if (key_cache.dim() == 5) sizes.insert(sizes.begin(), p.sizes.num_layers);
  Tensor key = torch::stable::new_empty(key_cache, sizes);
  Tensor value = torch::stable::new_empty(key_cache, sizes);
  p.total_tokens = total_tokens;
  p.key_cache = key_cache.const_data_ptr();
  p.value_cache = value_cache.const_data_ptr();
  p.key = key.mutable_data_ptr();
  p.value = value.mutable_data_ptr();
  p.key_strides = token_strides(key);
  p.value_strides = token_strides(value);
  p.key_cache_strides = cache_strides(key_cache);
  p.value_cache_strides = cache_strides(value_cache);
  const auto& kernel = cpu::kernels().extract_kv;
  for_each_item(extract_kv_work(p), key.numel() * size_of(p.dtype) * 2,
                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return {key, value};
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("extract_kv", TORCH_BOX(&extract_kv));
}

}  // namespace baton::bindings
