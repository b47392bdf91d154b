// extract_kv on the CPU: one work item copies one query's columns of one layer and KV head.
#include "cpu/copy.h"
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

namespace {

void extract_one(const ExtractKvParams& p, const CopyItem& item, const void* cache,
                 const CacheStrides& strides, void* target, const TokenStrides& target_strides) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t begin = p.cu_seqlens[item.query];
  const int64_t count = p.cu_seqlens[item.query + 1] - begin;
  const auto copy = p.reuses_memory ? copy_rows_away : copy_rows;
  copy(static_cast<char*>(target) + bytes * offset(target_strides, item.layer, begin, item.head),
       bytes * target_strides.token_stride,
       static_cast<const char*>(cache) + bytes * offset(strides, item.layer, p.slots[item.query],
                                                        item.head, p.starts[item.query]),
       bytes * strides.column_stride, count, bytes * p.sizes.head_dim);
}

}  // namespace

void extract_kv(const ExtractKvParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const CopyItem item = copy_item(i, p.num_queries, p.sizes.num_kv_heads);
    extract_one(p, item, p.key_cache, p.key_cache_strides, p.key, p.key_strides);
    extract_one(p, item, p.value_cache, p.value_cache_strides, p.value, p.value_strides);
  }
}

}  // namespace baton::cpu::BATON_ISA
