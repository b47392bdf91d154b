// extract_kv on the CPU: one work item copies one block of packed tokens of one layer, all heads.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"
#include "cpu/simd/eight_bit.h"

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

// The same from an eight-bit cache: converted to floats, or unconverted with their scales.
void dequantize_tokens(const ExtractKvParams& p, int64_t layer, int64_t query, int64_t begin,
                       int64_t end, const void* cache, const CacheStrides& strides,
                       const float* scales, const CacheStrides& scale_strides, void* target,
                       const TokenStrides& target_strides) {
  const int64_t dim = p.sizes.head_dim, slot = p.slots[query];
  const int64_t first = p.starts[query] + begin - p.cu_seqlens[query];
  dispatch_eight_bit(p.cache_dtype, [&]<typename S>() {
    const auto each = [&](const auto& write) BATON_INLINE_LAMBDA {
      for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
        for (int64_t token = begin; token < end; ++token) {
          const int64_t column = first + token - begin;
          write(static_cast<const S*>(cache) + offset(strides, layer, slot, head, column),
                scales[offset(scale_strides, layer, slot, head, column)],
                offset(target_strides, layer, token, head));
        }
      }
    };
    if (is_eight_bit(p.dtype)) {
      return each([&](const S* elements, float scale, int64_t to) {
        S* token = static_cast<S*>(target) + to;
        __builtin_memcpy(token, elements, dim);
        __builtin_memcpy(token + dim, &scale, kScaleBytes);
      });
    }
    dispatch_dtype(p.dtype, [&]<typename T>() {
      each([&](const S* elements, float scale, int64_t to) {
        dequantize(elements, scale, dim, static_cast<T*>(target) + to);
      });
    });
  });
}

}  // namespace

void extract_kv(const ExtractKvParams& p, int64_t begin, int64_t end) {
  const int64_t blocks = num_token_blocks(p.sizes, p.dtype, p.total_tokens);
  const int64_t size = tokens_per_block(p.sizes, p.dtype);
  // Pages that the operating system has just cleared are still in the caches: better write there.
  const bool streams = p.reuses_memory && extract_kv_bytes(p) >= kStreamBytes;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t layer = i / blocks, first = i % blocks * size;
    const int64_t last = first + size < p.total_tokens ? first + size : p.total_tokens;
    for_each_query(
        p.cu_seqlens, p.num_queries, first, last, [&](int64_t query, int64_t from, int64_t to) {
          if (is_eight_bit(p.cache_dtype)) {
            dequantize_tokens(p, layer, query, from, to, p.key_cache, p.key_cache_strides,
                              p.scales.key, p.scales.key_strides, p.key, p.key_strides);
            dequantize_tokens(p, layer, query, from, to, p.value_cache, p.value_cache_strides,
                              p.scales.value, p.scales.value_strides, p.value, p.value_strides);
            return;
          }
          extract_tokens(p, layer, query, from, to, streams, p.key_cache, p.key_cache_strides,
                         p.key, p.key_strides);
          extract_tokens(p, layer, query, from, to, streams, p.value_cache, p.value_cache_strides,
                         p.value, p.value_strides);
        });
  }
  if (streams) end_stream();
}

}  // namespace baton::cpu::BATON_ISA
