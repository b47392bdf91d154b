// extract_kv on the CPU: one work item copies one block of packed tokens of one layer, all heads.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Tokens [begin, end) of one query.
void extract_tokens(const ExtractKvParams& p, int64_t layer, int64_t query, int64_t begin,
                    int64_t end, bool streams, const void* cache, const CacheStrides& strides,
                    void* target, const TokenStrides& target_strides) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t column = p.starts[query] + begin - p.cu_seqlens[query];
  for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    copy_rows_away(streams,
                   static_cast<char*>(target) + bytes * offset(target_strides, layer, begin, head),
                   bytes * target_strides.token_stride,
                   static_cast<const char*>(cache) +
                       bytes * offset(strides, layer, p.slots[query], head, column),
                   bytes * strides.column_stride, end - begin, bytes * p.sizes.head_dim);
  }
}

}  // namespace

void extract_kv(const ExtractKvParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = num_token_blocks(p.sizes, p.dtype, p.total_tokens);
  const int64_t size = tokens_per_block(p.sizes, p.dtype);
  // Pages that the kernel has just cleared are better written through the caches they lie in.
  const bool streams = p.reuses_memory && extract_kv_bytes(p) >= kStreamBytes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t layer = i / blocks, first = i % blocks * size;
    const int64_t last = first + size < p.total_tokens ? first + size : p.total_tokens;
    for_each_query(p.cu_seqlens, p.num_queries, first, last,
                   [&](int64_t query, int64_t from, int64_t to) {
                     extract_tokens(p, layer, query, from, to, streams, p.key_cache,
                                    p.key_cache_strides, p.key, p.key_strides);
                     extract_tokens(p, layer, query, from, to, streams, p.value_cache,
                                    p.value_cache_strides, p.value, p.value_strides);
                   });
  }
  if (streams) end_stream();
}

}  // namespace baton::cpu::BATON_ISA
