// insert_kv on the CPU: one work item copies one block of packed tokens of one layer, all heads, or
// clears the padding of one query in one layer.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Tokens [begin, end) of one query.
void insert_tokens(const InsertKvParams& p, int64_t layer, int64_t query, int64_t begin,
                   int64_t end, bool streams, const void* source,
                   const TokenStrides& source_strides, void* cache, const CacheStrides& strides) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t column = p.starts[query] + begin - p.cu_seqlens[query];
  for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    copy_rows_away(
        streams,
        static_cast<char*>(cache) + bytes * offset(strides, layer, p.slots[query], head, column),
        bytes * strides.column_stride,
        static_cast<const char*>(source) + bytes * offset(source_strides, layer, begin, head),
        bytes * source_strides.token_stride, end - begin, bytes * p.sizes.head_dim);
  }
}

void clear_padding(const InsertKvParams& p, int64_t layer, int64_t query, void* cache,
                   const CacheStrides& strides) {
  const int64_t bytes = size_of(p.dtype), row_bytes = p.sizes.head_dim * bytes;
  const int64_t count = p.starts[query];
  for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    char* target =
        static_cast<char*>(cache) + bytes * offset(strides, layer, p.slots[query], head, 0);
    if (strides.column_stride == p.sizes.head_dim) {
      __builtin_memset(target, 0, count * row_bytes);
      continue;
    }
    for (int64_t column = 0; column < count; ++column) {
      __builtin_memset(target + bytes * column * strides.column_stride, 0, row_bytes);
    }
  }
}

}  // namespace

void insert_kv(const InsertKvParams& p, int64_t begin, int64_t end) {
  const int64_t clearing = insert_kv_clearing_work(p);
  for (; begin < end && begin < clearing; ++begin) {
    const int64_t layer = begin / p.num_queries, query = begin % p.num_queries;
    clear_padding(p, layer, query, p.key_cache, p.key_cache_strides);
    clear_padding(p, layer, query, p.value_cache, p.value_cache_strides);
  }
  const int64_t blocks = num_token_blocks(p.sizes, p.dtype, p.total_tokens);
  const int64_t size = tokens_per_block(p.sizes, p.dtype);
  const bool streams = insert_kv_bytes(p) >= kStreamBytes;
  for (int64_t i = begin - clearing; i < end - clearing; ++i) {
    const int64_t layer = i / blocks, first = i % blocks * size;
    const int64_t last = first + size < p.total_tokens ? first + size : p.total_tokens;
    for_each_query(p.cu_seqlens, p.num_queries, first, last,
                   [&](int64_t query, int64_t from, int64_t to) {
                     insert_tokens(p, layer, query, from, to, streams, p.key, p.key_strides,
                                   p.key_cache, p.key_cache_strides);
                     insert_tokens(p, layer, query, from, to, streams, p.value, p.value_strides,
                                   p.value_cache, p.value_cache_strides);
                   });
  }
  if (streams) end_stream();
}

}  // namespace baton::cpu::BATON_ISA
