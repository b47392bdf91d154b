// All kernels on a few shapes each, on arrays of exactly the size they need, for the sanitizers to
// watch. The exit status is 1 when the emulator reports anything. Results are the op tests'
// business.
#include <vector>

#include "cuda/kernels.h"
#include "emulation/cuda/attention_call.h"

namespace {

using namespace baton;
using namespace calls;

constexpr int64_t kSlots = 3, kCapacity = 40;

CacheSizes sizes(const Shape& s) { return {s.layers, kSlots, s.heads, kCapacity, s.head_dim}; }
int64_t cache_bytes(const Shape& s) {
  return s.layers * kSlots * s.heads * kCapacity * s.head_dim * size_of(s.dtype);
}
CacheStrides cache_strides(const Shape& s) {
  const int64_t head = kCapacity * s.head_dim, slot = s.heads * head;
  return {kSlots * slot, slot, head, s.head_dim};
}
TokenStrides token_strides(const Shape& s, int64_t tokens) {
  return {tokens * s.heads * s.head_dim, s.heads * s.head_dim, s.head_dim};
}

void copies(const Shape& s) {
  Bytes bounds({0, 7, 7, 30}), slots({2, 0, 1}), starts({33, 3, 5});
  const int64_t tokens = 30, bytes = s.layers * tokens * s.heads * s.head_dim * size_of(s.dtype);
  Bytes key(bytes), value(bytes), key_cache(cache_bytes(s)), value_cache(cache_bytes(s));
  for (const bool zero_padding : {false, true}) {
    expect(cuda::insert_kv({.key = key,
                            .value = value,
                            .key_cache = key_cache,
                            .value_cache = value_cache,
                            .cu_seqlens = bounds,
                            .slots = slots,
                            .starts = starts,
                            .num_queries = 3,
                            .total_tokens = tokens,
                            .sizes = sizes(s),
                            .key_strides = token_strides(s, tokens),
                            .value_strides = token_strides(s, tokens),
                            .key_cache_strides = cache_strides(s),
                            .value_cache_strides = cache_strides(s),
                            .dtype = s.dtype,
                            .zero_padding = zero_padding},
                           nullptr),
           "insert_kv");
  }
  expect(cuda::extract_kv({.key_cache = key_cache,
                           .value_cache = value_cache,
                           .key = key,
                           .value = value,
                           .cu_seqlens = bounds,
                           .slots = slots,
                           .starts = starts,
                           .num_queries = 3,
                           .total_tokens = tokens,
                           .sizes = sizes(s),
                           .key_cache_strides = cache_strides(s),
                           .value_cache_strides = cache_strides(s),
                           .key_strides = token_strides(s, tokens),
                           .value_strides = token_strides(s, tokens),
                           .dtype = s.dtype},
                          nullptr),
         "extract_kv");
  Bytes from({0, 1, 2}), from_start({0, 11, 2}), to({0, 1, 2}), to_start({3, 1, 20}),
      lengths({37, 29, 18});
  expect(cuda::move_kv({.key_cache = key_cache,
                        .value_cache = value_cache,
                        .source_slots = from,
                        .source_starts = from_start,
                        .target_slots = to,
                        .target_starts = to_start,
                        .lengths = lengths,
                        .num_moves = 3,
                        .sizes = sizes(s),
                        .key_cache_strides = cache_strides(s),
                        .value_cache_strides = cache_strides(s),
                        .dtype = s.dtype},
                       nullptr),
         "move_kv");
}

void append(Shape s) {
  s.layers = 1;
  const int64_t rows = 11, query_heads = 2 * s.heads, token = s.head_dim * size_of(s.dtype);
  Bytes slots({0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1}),
      columns({39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29});
  Bytes key(rows * s.heads * token), value(rows * s.heads * token), key_cache(cache_bytes(s)),
      value_cache(cache_bytes(s)), query(rows * query_heads * token),
      rotated(rows * query_heads * token), cos(rows * s.head_dim / 2 * 4),
      sin(rows * s.head_dim / 2 * 4);
  for (const bool rotate : {false, true}) {
    expect(cuda::append_kv({.key = key,
                            .value = value,
                            .query = query,
                            .rotated_query = rotated,
                            .key_cache = key_cache,
                            .value_cache = value_cache,
                            .slots = slots,
                            .columns = columns,
                            .cos = rotate ? static_cast<float*>(cos) : nullptr,
                            .sin = rotate ? static_cast<float*>(sin) : nullptr,
                            .num_rows = rows,
                            .num_heads = query_heads,
                            .rotary_dim = s.head_dim / 2,
                            .cos_row_stride = s.head_dim / 2,
                            .sin_row_stride = s.head_dim / 2,
                            .sizes = sizes(s),
                            .key_strides = token_strides(s, rows),
                            .value_strides = token_strides(s, rows),
                            .query_strides = {0, query_heads * s.head_dim, s.head_dim},
                            .key_cache_strides = cache_strides(s),
                            .value_cache_strides = cache_strides(s),
                            .dtype = s.dtype,
                            .rotary_dtype = Dtype::kFloat32},
                           nullptr),
           "append_kv");
  }
}

void merge(const Shape& s) {
  const int64_t queries = 5, count = queries * s.heads,
                bytes = count * s.head_dim * size_of(s.dtype);
  Bytes a(bytes), b(bytes), out(bytes), lse_a(count * 4), lse_b(count * 4), lse(count * 4);
  expect(cuda::merge_attention({.out_a = a,
                                .out_b = b,
                                .lse_a = lse_a,
                                .lse_b = lse_b,
                                .out = out,
                                .lse = lse,
                                .num_queries = queries,
                                .num_heads = s.heads,
                                .head_dim = s.head_dim,
                                .out_a_strides = token_strides(s, queries),
                                .out_b_strides = token_strides(s, queries),
                                .dtype = s.dtype},
                               nullptr),
         "merge_attention");
}

void indices(int64_t rows) {
  Bytes values((2 * rows + 1) * 4);
  expect(cuda::fill_indices({.values = values, .num_rows = rows}, nullptr), "fill_indices");
}

}  // namespace

int main() {
  const Shape shapes[] = {{Dtype::kFloat32, 1, 3, 24},
                          {Dtype::kFloat16, 2, 2, 80},
                          {Dtype::kBFloat16, 1, 8, 128},
                          {Dtype::kBFloat16, 3, 1, 256}};
  for (const Shape& shape : shapes) {
    copies(shape);
    append(shape);
    merge(shape);
  }
  // A block costs the real ThreadSanitizer a tenth of a second, hence few heads.
  const Shape attention_shapes[] = {{Dtype::kFloat32, 1, 1, 24},
                                    {Dtype::kFloat16, 1, 2, 80},
                                    {Dtype::kBFloat16, 1, 1, 128},
                                    {Dtype::kBFloat16, 1, 1, 256}};
  for (const Shape& shape : attention_shapes) {
    for (const bool options : {false, true}) attend(shape, options);
    attend(shape, false, true);
  }
  for (const bool paged : {false, true}) {
    attend({Dtype::kBFloat16, 1, 1, 128}, true, paged, PrefillKernel::kMma32);
  }
  attend({Dtype::kBFloat16, 1, 1, 128}, false, false, PrefillKernel::kWgmma);
  for (const int64_t rows : {0, 3, 300}) indices(rows);
  return failures != 0;
}
