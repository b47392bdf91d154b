// insert_kv on the CPU: one work item copies one query's columns of one layer and KV head.
#include "cpu/copy.h"
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

namespace {

void insert_one(const InsertKvParams& p, const CopyItem& item, const void* source,
                const TokenStrides& source_strides, void* cache, const CacheStrides& strides) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t row_bytes = p.sizes.head_dim * bytes;
  const int64_t begin = p.cu_seqlens[item.query];
  const int64_t count = p.cu_seqlens[item.query + 1] - begin;
  const int64_t slot = p.slots[item.query], start = p.starts[item.query];
  char* target =
      static_cast<char*>(cache) + bytes * offset(strides, item.layer, slot, item.head, 0);
  if (p.zero_padding) {
    if (strides.column_stride == p.sizes.head_dim) {
      __builtin_memset(target, 0, start * row_bytes);
    } else {
      for (int64_t column = 0; column < start; ++column) {
        __builtin_memset(target + bytes * column * strides.column_stride, 0, row_bytes);
      }
    }
  }
  copy_rows_away(target + bytes * start * strides.column_stride, bytes * strides.column_stride,
                 static_cast<const char*>(source) +
                     bytes * offset(source_strides, item.layer, begin, item.head),
                 bytes * source_strides.token_stride, count, row_bytes);
}

}  // namespace

void insert_kv(const InsertKvParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const CopyItem item = copy_item(i, p.num_queries, p.sizes.num_kv_heads);
    insert_one(p, item, p.key, p.key_strides, p.key_cache, p.key_cache_strides);
    insert_one(p, item, p.value, p.value_strides, p.value_cache, p.value_cache_strides);
  }
}

}  // namespace baton::cpu::BATON_ISA
