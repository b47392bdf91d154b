// ragged_attention on the CPU: one work item is one (row, KV head, query tile, split). It streams
// its columns once, in blocks of kBlockKeys, with a running maximum and sum, so that scores exist
// for one block only. Padding columns are never loaded; hidden ones are skipped where a whole block
// is hidden.
#include "cpu/kernels.h"
#include "cpu/ragged_attention/softmax.h"
#include "cpu/ragged_attention/tile_amx.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Streams the tile's keys and values; leaves sums, maxima and totals in scratch. `ahead` asks for
// what will be streamed next; null where the tile before had the same keys and values.
template <typename T>
void stream(const RaggedAttentionParams& p, const Tile& t, const Streams<T>& from,
            ReadAhead<T>* ahead, AttentionScratch& scratch) {
  typedef AttentionProducts<T> Products;
  const int64_t dim = p.sizes.head_dim;
  const int count = static_cast<int>(t.count);
  const T* query[kMaxQueries];
  View views[kMaxQueries];
  int m = 0;
  for (int64_t token = t.token; token < t.token + t.num_tokens; ++token) {
    Range range = visible(p, t, token);
    // Another split sees to what lies behind this one's end.
    if (range.end > t.end) range.end = t.end;
    for (int64_t head = t.first_head; head < t.first_head + t.num_heads; ++head, ++m) {
      query[m] = static_cast<const T*>(p.query) +
                 offset(p.query_strides, 0, p.cu_seqlens[t.row] + token, head);
      views[m] = {range, t.length - t.query_length + token,
                  p.alibi_slopes ? p.alibi_slopes[head] : 0.0f};
      scratch.maximum[m] = kNothing;
      store(scratch.sum[m], zero());
      for (int64_t d = 0; d < attention_sums(dim); d += kLanes) store(&scratch.out[m][d], zero());
    }
  }
  Products::load_queries(query, count, dim, scratch);
  const int64_t key_stride = p.key_cache_strides.column_stride;
  const int64_t value_stride = p.value_cache_strides.column_stride;
  for (int64_t first = t.begin; first < t.end; first += kBlockKeys) {
    const int64_t done = first - t.begin, remaining = t.end - first;
    const int64_t here = remaining < kBlockKeys ? remaining : kBlockKeys;
    const Rows<T> keys{from.keys + done * key_stride, key_stride, here, dim,
                       ahead ? ahead->step(here) : Ask<T>{}};
    Products::score(query, count, keys, scratch);
    BlockSoftmax<Products> softmax(p, views, count, first, here, scratch);
    const Rows<T> values{from.values + done * value_stride, value_stride, here, dim,
                         ahead ? ahead->step(here) : Ask<T>{}};
    Products::weigh(count, values, softmax, scratch);
  }
}

// Divides by the softmax denominator, the sink included, and writes the result of one query vector.
template <typename T>
void write_result(const RaggedAttentionParams& p, int64_t token, int64_t head, const float* sums,
                  float maximum, float sum) {
  const int64_t dim = p.sizes.head_dim, index = token * p.num_heads + head;
  T* out = static_cast<T*>(p.out) + index * dim;
  float top = maximum, total = sum, weight = 1.0f;
  // A sink of -inf is none; it must not meet another -inf in a difference.
  if (p.sinks && p.sinks[head] != kNothing) {
    const float sink = p.sinks[head];
    top = sink > maximum ? sink : maximum;
    weight = maximum == kNothing ? 0.0f : exp(set1(maximum - top))[0];
    total = sum * weight + exp(set1(sink - top))[0];
  }
  if (p.lse) p.lse[index] = total == 0.0f ? kNothing : top + __builtin_logf(total);
  if (sum == 0.0f) {
    __builtin_memset(out, 0, dim * sizeof(T));
    return;
  }
  AttentionProducts<T>::put_result(sums, dim, weight / total, out);
}

template <typename T>
void run_tile(const RaggedAttentionParams& p, const AttentionWork& work, const AttentionItem& item,
              const AttentionRowPlan& plan, const Tile& tile, ReadAhead<T>* ahead,
              AttentionScratch& scratch) {
  stream<T>(p, tile, streams<T>(p, tile, item.kv_head), ahead, scratch);
  const int64_t dim = p.sizes.head_dim;
  int m = 0;
  for (int64_t token = tile.token; token < tile.token + tile.num_tokens; ++token) {
    for (int64_t head = tile.first_head; head < tile.first_head + tile.num_heads; ++head, ++m) {
      const float sum = reduce_add(load(scratch.sum[m]));
      if (plan.num_splits == 1) {
        write_result<T>(p, p.cu_seqlens[item.row] + token, head, scratch.out[m], scratch.maximum[m],
                        sum);
        continue;
      }
      float* partial = work.partials + work.partial_offsets[item.row] +
                       ((token * p.num_heads + head) * plan.num_splits + item.split) *
                           attention_partial_size(dim);
      const int64_t num_sums = attention_sums(dim);
      __builtin_memcpy(partial, scratch.out[m], num_sums * sizeof(float));
      partial[num_sums] = scratch.maximum[m];
      partial[num_sums + 1] = sum;
    }
  }
}

template <typename T>
void run_item(const RaggedAttentionParams& p, const AttentionWork& work, const AttentionItem& item,
              ReadAhead<T>& ahead, AttentionScratch& scratch) {
  const AttentionRowPlan plan = row_plan(p, item.row);
  Tile tile = make_tile(p, item, plan);
  // Groups wider than a tile are taken in parts; their keys and values are then in the core's
  // cache.
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  for (int64_t head = 0; head < group; head += kAttentionTileQueries) {
    tile.first_head = item.kv_head * group + head;
    tile.num_heads = group - head < kAttentionTileQueries ? group - head : kAttentionTileQueries;
    tile.count = tile.num_tokens * tile.num_heads;
    run_tile<T>(p, work, item, plan, tile, head == 0 ? &ahead : nullptr, scratch);
  }
}

// Merges the partial results of one query vector in column order.
template <typename T>
void merge_splits(const RaggedAttentionParams& p, const float* partials, int64_t num_splits,
                  int64_t token, int64_t head) {
  const int64_t num_sums = attention_sums(p.sizes.head_dim);
  const int64_t size = attention_partial_size(p.sizes.head_dim);
  float top = kNothing;
  bool saw = false;
  for (int64_t s = 0; s < num_splits; ++s) {
    const float maximum = partials[s * size + num_sums];
    top = maximum > top ? maximum : top;
    saw = saw || partials[s * size + num_sums + 1] != 0.0f;
  }
  alignas(64) float sums[kMaxHeadDim] = {};
  float sum = 0.0f;
  for (int64_t s = 0; s < num_splits && saw; ++s) {
    const float* partial = partials + s * size;
    if (partial[num_sums + 1] == 0.0f) continue;
    const float weight = exp(set1(partial[num_sums] - top))[0];
    sum += partial[num_sums + 1] * weight;
    for (int64_t d = 0; d < num_sums; ++d) sums[d] += partial[d] * weight;
  }
  write_result<T>(p, token, head, sums, top, sum);
}

}  // namespace

void ragged_attention(const RaggedAttentionParams& p, const AttentionWork& work, int64_t begin,
                      int64_t end) {
  AttentionScratch scratch;
  dispatch_dtype(p.dtype, [&]<typename T>() {
    [[maybe_unused]] const typename AttentionProducts<T>::Scope scope;
    ReadAhead<T> ahead(p, work, begin, end);
    for (int64_t i = begin; i < end; ++i) {
      ahead.begin(i);
      run_item<T>(p, work, work.items[i], ahead, scratch);
    }
  });
}

// One item is one KV head of one row: a single long row, too, is shared among the threads.
void ragged_attention_merge(const RaggedAttentionParams& p, const AttentionWork& work,
                            int64_t begin, int64_t end) {
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  const int64_t size = attention_partial_size(p.sizes.head_dim);
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / p.sizes.num_kv_heads, kv_head = i % p.sizes.num_kv_heads;
      if (work.partial_offsets[row] < 0) continue;
      const int64_t first = p.cu_seqlens[row], tokens = p.cu_seqlens[row + 1] - first;
      const int64_t num_splits = row_plan(p, row).num_splits;
      const float* partials = work.partials + work.partial_offsets[row];
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          merge_splits<T>(p, partials + (token * p.num_heads + head) * num_splits * size,
                          num_splits, first + token, head);
        }
      }
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
