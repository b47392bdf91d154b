// insert_kv on the CPU: one work item copies, or quantizes, one block of packed tokens of one layer
// with all heads, or clears the padding of one query in one layer.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"
#include "cpu/simd/eight_bit.h"

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

// The same into an eight-bit cache.
void quantize_tokens(const InsertKvParams& p, int64_t layer, int64_t query, int64_t begin,
                     int64_t end, const void* source, const TokenStrides& source_strides,
                     void* cache, const CacheStrides& strides, float* scales,
                     const CacheStrides& scale_strides) {
  const int64_t dim = p.sizes.head_dim, slot = p.slots[query];
  const int64_t first = p.starts[query] + begin - p.cu_seqlens[query];
  dispatch_eight_bit(p.cache_dtype, [&]<typename S>() {
    // Calls write(head, token, elements, scale).
    const auto each = [&](const auto& write) BATON_INLINE_LAMBDA {
      for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
        for (int64_t token = begin; token < end; ++token) {
          const int64_t column = first + token - begin;
          write(offset(source_strides, layer, token, head),
                static_cast<S*>(cache) + offset(strides, layer, slot, head, column),
                scales + offset(scale_strides, layer, slot, head, column));
        }
      }
    };
    if (is_eight_bit(p.dtype)) {
      return each([&](int64_t from, S* elements, float* scale) {
        const S* token = static_cast<const S*>(source) + from;
        __builtin_memcpy(elements, token, dim);
        __builtin_memcpy(scale, token + dim, kScaleBytes);
      });
    }
    dispatch_dtype(p.dtype, [&]<typename T>() {
      each([&](int64_t from, S* elements, float* scale) {
        *scale = quantize(static_cast<const T*>(source) + from, dim, elements);
      });
    });
  });
}

void clear_scales(const InsertKvParams& p, int64_t layer, int64_t query, float* scales,
                  const CacheStrides& strides) {
  for (int64_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    for (int64_t column = 0; column < p.starts[query]; ++column) {
      scales[offset(strides, layer, p.slots[query], head, column)] = 0.0f;
    }
  }
}

void clear_padding(const InsertKvParams& p, int64_t layer, int64_t query, void* cache,
                   const CacheStrides& strides) {
  const int64_t bytes = size_of(p.cache_dtype), row_bytes = p.sizes.head_dim * bytes;
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
    if (is_eight_bit(p.cache_dtype)) {
      clear_scales(p, layer, query, p.scales.key, p.scales.key_strides);
      clear_scales(p, layer, query, p.scales.value, p.scales.value_strides);
    }
  }
  const int64_t blocks = num_token_blocks(p.sizes, p.dtype, p.total_tokens);
  const int64_t size = tokens_per_block(p.sizes, p.dtype);
  const bool streams = insert_kv_bytes(p) >= kStreamBytes;
  for (int64_t i = begin - clearing; i < end - clearing; ++i) {
    const int64_t layer = i / blocks, first = i % blocks * size;
    const int64_t last = first + size < p.total_tokens ? first + size : p.total_tokens;
    for_each_query(
        p.cu_seqlens, p.num_queries, first, last, [&](int64_t query, int64_t from, int64_t to) {
          if (is_eight_bit(p.cache_dtype)) {
            quantize_tokens(p, layer, query, from, to, p.key, p.key_strides, p.key_cache,
                            p.key_cache_strides, p.scales.key, p.scales.key_strides);
            quantize_tokens(p, layer, query, from, to, p.value, p.value_strides, p.value_cache,
                            p.value_cache_strides, p.scales.value, p.scales.value_strides);
            return;
          }
          insert_tokens(p, layer, query, from, to, streams, p.key, p.key_strides, p.key_cache,
                        p.key_cache_strides);
          insert_tokens(p, layer, query, from, to, streams, p.value, p.value_strides, p.value_cache,
                        p.value_cache_strides);
        });
  }
  if (streams) end_stream();
}

}  // namespace baton::cpu::BATON_ISA
