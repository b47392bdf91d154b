// ragged_attention on the CPU. One work item is one (row, KV head, query tile), or one segment of
// its keys. It streams its columns once, in blocks of kBlockKeys, with a running maximum and sum,
// so scores exist for one block at a time. Padding columns are never loaded; hidden columns are
// skipped where a whole block is hidden.
//
// Eight-bit keys and values are converted to query's type a block at a time and then multiplied in
// that type. float32 holds elements times their scales; bfloat16 and float16 hold the elements
// exactly, and the scales multiply scores and probabilities. For bfloat16 queries there are int8
// products (int8.h) on CPUs that have the instructions.
//
// Blocks and segments begin at fixed keys of the row, and every decision about a query vector is
// made from its own scores. So a token has the same bits however its row is cut into calls, items
// and tiles.
#include "cpu/kernels.h"
#include "cpu/ragged_attention/block_rows.h"
#include "cpu/ragged_attention/int8.h"
#include "cpu/ragged_attention/softmax.h"
#include "cpu/ragged_attention/tile_amx.h"

namespace baton::cpu::BATON_ISA {

namespace {

// A tile's query vectors, and which keys each of them sees.
template <typename T>
struct TileQueries {
  const T* query[kMaxQueries];
  View views[kMaxQueries];
  int count = 0;

  TileQueries() = default;
  TileQueries(const RaggedAttentionParams& p, const Tile& t) { add(p, t); }

  void add(const RaggedAttentionParams& p, const Tile& t) {
    for (int64_t token = t.token; token < t.token + t.num_tokens; ++token) {
      for (int64_t head = t.first_head; head < t.first_head + t.num_heads; ++head, ++count) {
        query[count] = static_cast<const T*>(p.query) +
                       offset(p.query_strides, 0, p.cu_seqlens[t.row] + token, head);
        views[count] = {visible(p, t, token), t.length - t.query_length + token,
                        p.alibi_slopes ? p.alibi_slopes[head] : 0.0f};
      }
    }
  }

  // Whether any of these keys is hidden from any of the vectors.
  bool some_hides(int64_t begin, int64_t end) const {
    bool hides = false;
    for (int m = 0; m < count; ++m) hides = hides || views[m].hides(begin, end);
    return hides;
  }
};

// The product with values where some query vectors do not see all of the block's keys. A hidden
// value may be NaN or infinite, and times a probability of 0 that is NaN. So each vector multiplies
// a copy in which the rows that it does not see are 0, in the same order of additions.
template <typename BlockRows, typename Softmax>
__attribute__((noinline)) void weigh_visible(const View* views, int count, int64_t first_key,
                                             const BlockRows& values, Softmax& softmax,
                                             AttentionScratch& scratch) {
  typedef typename BlockRows::Element T;
  alignas(64) T copy[kBlockKeys][kMaxHeadDim];
  alignas(64) float before[kMaxQueries * kMaxHeadDim], after[kMaxQueries * kMaxHeadDim];
  const int64_t stride = scratch.out.stride, size = stride * sizeof(float);
  __builtin_memcpy(before, scratch.out.data, count * size);
  int next = 0;
  for (int m = 0; m < count; m = next) {
    const Range range = views[m].range;
    for (int64_t k = values.first; k < values.count; ++k) {
      const bool sees = first_key + k >= range.begin && first_key + k < range.end;
      const T* row = values.row(k);
      if (sees) __builtin_memcpy(copy[k], row, values.dim * sizeof(T));
      if (!sees) __builtin_memset(copy[k], 0, values.dim * sizeof(T));
    }
    __builtin_memcpy(scratch.out.data, before, count * size);
    const Rows<T> seen{copy[0], kMaxHeadDim, values.first, values.count, values.dim, {}};
    AttentionProducts<T>::weigh(count, seen, softmax, scratch);
    // All heads of a token see the same keys.
    for (; next < count && views[next].range.begin == range.begin &&
           views[next].range.end == range.end;
         ++next) {
      __builtin_memcpy(after + next * stride, scratch.out[next], size);
    }
  }
  __builtin_memcpy(scratch.out.data, after, count * size);
}

// Whether int8 products replace those of T.
template <typename T>
BATON_INLINE bool multiplies_int8(const RaggedAttentionParams& p) {
  return Int8Products<T>::kExist && p.cache_dtype == Dtype::kInt8;
}

// Processes one block with int8 products, from the scores to the sums.
template <typename T>
void stream_int8_block(const RaggedAttentionParams& p, const TileQueries<T>& queries,
                       const Streams<Int8>& from, int64_t block, int64_t first, int64_t end,
                       ReadAhead<Int8>* ahead, AttentionScratch& scratch) {
  typedef Int8Products<T> Products;
  Int8Rows rows{{}, first, end, p.sizes.head_dim, {}};
  for (int64_t k = 0; k < first; ++k) rows.row[k] = kZeroRow;
  for (int64_t k = end; k < kBlockKeys; ++k) rows.row[k] = kZeroRow;
  const auto take = [&](const Stream<Int8>& of) BATON_INLINE_LAMBDA {
    rows.ask = ahead ? ahead->step(end - first) : Ask<Int8>{};
    const Int8** next = rows.row + first;
    of.for_each_run(block + first, end - first, [&](const Int8* row, int64_t count) {
      for (; count > 0; --count, row += of.stride()) *next++ = row;
    });
  };
  take(from.keys);
  Products::score(queries.count, rows, scratch);
  const BlockSoftmax<typename Products::Weights> softmax(p, queries.views, queries.count, block,
                                                         end, scratch);
  take(from.values);
  Products::weigh(queries.count, rows, scratch);
}

// Converts the tile's query vectors into the form that the scores need.
template <typename T>
void load_queries(const RaggedAttentionParams& p, const TileQueries<T>& queries,
                  AttentionScratch& scratch) {
  const int64_t dim = p.sizes.head_dim;
  if constexpr (Int8Products<T>::kExist) {
    if (multiplies_int8<T>(p)) {
      return Int8Products<T>::load_queries(queries.query, queries.count, dim, scratch);
    }
  }
  AttentionProducts<T>::load_queries(queries.query, queries.count, dim, scratch);
}

// Streams keys [begin, end) of the tile, starting from empty sums; leaves sums, maxima and totals
// in scratch. `ahead` prefetches what will be streamed next; null where that has been streamed
// before. S: T, or Int8 for eight-bit elements of either kind.
template <typename T, typename S, bool kCareful>
void stream(const RaggedAttentionParams& p, const TileQueries<T>& queries, const Streams<S>& from,
            Range keys, ReadAhead<S>* ahead, AttentionScratch& scratch) {
  typedef AttentionProducts<T> Products;
  constexpr bool kWidens = sizeof(S) == 1;
  const int64_t dim = p.sizes.head_dim;
  const int count = queries.count;
  for (int m = 0; m < count; ++m) {
    scratch.maximum[m] = kNothing;
    store(scratch.sum[m], zero());
    for (int64_t d = 0; d < attention_sums(dim); d += kLanes) store(&scratch.out[m][d], zero());
  }
  int64_t first = keys.begin % kBlockKeys;
  for (int64_t block = keys.begin - first; block < keys.end; block += kBlockKeys, first = 0) {
    const int64_t end = keys.end - block < kBlockKeys ? keys.end - block : kBlockKeys;
    // Calls use(rows) with the block's keys or values.
    const auto with_rows = [&](const Stream<S>& of, [[maybe_unused]] const float* scales,
                               const auto& use) BATON_INLINE_LAMBDA {
      const Ask<S> ask = ahead ? ahead->step(end - first) : Ask<S>{};
      if constexpr (kWidens) {
        use(widened_rows<T>(p.cache_dtype, of, block, first, end, dim, ask, scales, scratch));
      } else {
        const Run<T> run = of.run(block + first, end - first);
        const bool is_one_run = run.count == end - first;
        if constexpr (Products::kHasScatteredRows) {
          if (!is_one_run && Products::uses_block_in_place(count)) {
            return use(scattered_rows(of, block, first, end, dim, ask, scratch));
          }
        }
        use(is_one_run ? Rows<T>{run.data - first * of.stride(), of.stride(), first, end, dim, ask}
                       : copied_rows(of, block, first, end, dim, ask, scratch));
      }
    };
    if constexpr (kWidens) {
      load_scales(from.key_scales, block, first, end, scratch.key_scales);
      load_scales(from.value_scales, block, first, end, scratch.value_scales);
    }
    if constexpr (kWidens && Int8Products<T>::kExist) {
      if (multiplies_int8<T>(p)) {
        stream_int8_block(p, queries, from, block, first, end, ahead, scratch);
        continue;
      }
    }
    with_rows(from.keys, scratch.key_scales,
              [&](const auto& keys) BATON_INLINE_LAMBDA { Products::score(count, keys, scratch); });
    BlockSoftmax<Products> softmax(p, queries.views, count, block, end, scratch);
    with_rows(from.values, scratch.value_scales, [&](const auto& values) BATON_INLINE_LAMBDA {
      if (kCareful && queries.some_hides(block + first, block + end)) {
        weigh_visible(queries.views, count, block, values, softmax, scratch);
      } else {
        Products::weigh(count, values, softmax, scratch);
      }
    });
  }
}

static bool has_nan(int count, int64_t dim, const AttentionScratch& scratch) {
  IntVec found{};
  for (int m = 0; m < count; ++m) {
    for (int64_t d = 0; d < attention_sums(dim); d += kLanes) {
      const Vec sums = load(&scratch.out[m][d]);
      found |= sums != sums;
    }
  }
  return any(found);
}

template <typename T, typename S>
void stream_segment(const RaggedAttentionParams& p, const TileQueries<T>& queries,
                    const Streams<S>& from, Range keys, ReadAhead<S>* ahead,
                    AttentionScratch& scratch) {
  stream<T, S, false>(p, queries, from, keys, ahead, scratch);
  // Products take whole blocks, so a hidden value that is not finite has left a NaN.
  if (queries.some_hides(keys.begin, keys.end) &&
      has_nan(queries.count, p.sizes.head_dim, scratch)) {
    stream<T, S, true>(p, queries, from, keys, nullptr, scratch);
  }
}

// The softmax of one query vector over the segments so far. sums [attention_sums(head_dim)] are
// relative to `maximum`.
struct Merged {
  float* sums;
  float maximum, sum;

  // Adds the next segment. A segment of which the vector saw nothing is skipped, and so is one
  // whose scores are all -inf.
  void add(const float* segment_sums, float segment_maximum, float segment_sum, int64_t num_sums) {
    if (segment_sum == 0.0f) return;
    const float top = maximum > segment_maximum ? maximum : segment_maximum;
    const Vec old_weight = exp(set1(maximum - top)), weight = exp(set1(segment_maximum - top));
    sum = fmadd(set1(sum), old_weight, set1(segment_sum) * weight)[0];
    for (int64_t d = 0; d < num_sums; d += kLanes) {
      store(sums + d, fmadd(load(sums + d), old_weight, load(segment_sums + d) * weight));
    }
    maximum = top;
  }
};

// Divides by the softmax denominator, sink included, and writes the result of one query vector.
// `sees`: whether it sees any key. If all of its scores are -inf and there is no sink, the
// denominator is 0 and the result NaN, as with torch.softmax.
template <typename T>
void write_result(const RaggedAttentionParams& p, int64_t token, int64_t head, bool sees,
                  const float* sums, float maximum, float sum) {
  const int64_t dim = p.sizes.head_dim, index = token * p.num_heads + head;
  T* out = static_cast<T*>(p.out) + index * dim;
  float top = maximum, total = sum, weight = 1.0f;
  // A sink of -inf means no sink; subtracting another -inf from it would give NaN.
  if (p.sinks && p.sinks[head] != kNothing) {
    const float sink = p.sinks[head];
    top = sink > maximum ? sink : maximum;
    weight = maximum == kNothing ? 0.0f : exp(set1(maximum - top))[0];
    total = sum * weight + exp(set1(sink - top))[0];
  }
  if (p.lse) p.lse[index] = total == 0.0f ? kNothing : top + __builtin_logf(total);
  if (!sees) {
    __builtin_memset(out, 0, dim * sizeof(T));
    return;
  }
  AttentionProducts<T>::put_result(sums, dim, weight / total, out);
}

// Where the partial result of one split of a query vector is stored.
static float* partial_of(const RaggedAttentionParams& p, const AttentionWork& work, int64_t row,
                         int64_t num_splits, int64_t split, int64_t token, int64_t head) {
  return work.partials + work.partial_offsets[row] +
         ((token * p.num_heads + head) * num_splits + split) *
             attention_partial_size(p.sizes.head_dim);
}

// Stores the partial result of query vector m, which was just streamed.
static void write_partial(const AttentionScratch& scratch, int m, int64_t dim, float* partial) {
  const int64_t num_sums = attention_sums(dim);
  __builtin_memcpy(partial, scratch.out[m], num_sums * sizeof(float));
  partial[num_sums] = scratch.maximum[m];
  partial[num_sums + 1] = reduce_add(load(scratch.sum[m]));
}

template <typename T, typename S>
void run_tile(const RaggedAttentionParams& p, const AttentionWork& work, const AttentionItem& item,
              const AttentionRowPlan& plan, const Tile& tile, ReadAhead<S>* ahead,
              AttentionScratch& scratch) {
  const int64_t dim = p.sizes.head_dim, num_sums = attention_sums(dim);
  const TileQueries<T> queries(p, tile);
  const int count = queries.count;
  const Streams<S> from(p, tile.row, item.kv_head);
  load_queries(p, queries, scratch);
  const auto segment_sum = [&](int m) { return reduce_add(load(scratch.sum[m])); };
  // Calls write(m, token, head) for every query vector.
  const auto for_each_vector = [&](const auto& write) {
    for (int m = 0; m < count; ++m) {
      write(m, tile.token + m / tile.num_heads, tile.first_head + m % tile.num_heads);
    }
  };
  const auto result = [&](const auto& of) {
    for_each_vector([&](int m, int64_t token, int64_t head) {
      const Range range = queries.views[m].range;
      const Merged merged = of(m);
      write_result<T>(p, p.cu_seqlens[item.row] + token, head, range.begin < range.end, merged.sums,
                      merged.maximum, merged.sum);
    });
  };
  const bool is_split = plan.num_splits > 1;
  const int64_t segment_end = attention_segment_begin(attention_segment_of(tile.begin) + 1);
  if (is_split || tile.end <= segment_end) {
    stream_segment<T, S>(p, queries, from, {tile.begin, tile.end}, ahead, scratch);
    if (!is_split) {
      return result(
          [&](int m) { return Merged{scratch.out[m], scratch.maximum[m], segment_sum(m)}; });
    }
    for_each_vector([&](int m, int64_t token, int64_t head) {
      write_partial(scratch, m, dim,
                    partial_of(p, work, item.row, plan.num_splits, item.split, token, head));
    });
    return;
  }
  Merged merged[kMaxQueries];
  for (int m = 0; m < count; ++m) {
    merged[m] = {scratch.merged[m], kNothing, 0.0f};
    __builtin_memset(merged[m].sums, 0, num_sums * sizeof(float));
  }
  for (int64_t begin = tile.begin; begin < tile.end;) {
    const int64_t next = attention_segment_begin(attention_segment_of(begin) + 1);
    const int64_t end = next < tile.end ? next : tile.end;
    stream_segment<T, S>(p, queries, from, {begin, end}, ahead, scratch);
    for (int m = 0; m < count; ++m) {
      merged[m].add(scratch.out[m], scratch.maximum[m], segment_sum(m), num_sums);
    }
    begin = end;
  }
  result([&](int m) { return merged[m]; });
}

// Computes one split whose keys several rows share.
template <typename T, typename S>
void run_shared_item(const RaggedAttentionParams& p, const AttentionWork& work,
                     const AttentionItem& item, ReadAhead<S>& ahead, AttentionScratch& scratch) {
  const int64_t group = p.num_heads / p.sizes.num_kv_heads, first_head = item.kv_head * group;
  const int32_t* rows = work.sharers + item.first_sharer;
  TileQueries<T> queries;
  Range keys{};
  for (int i = 0; i < item.num_sharers; ++i) {
    AttentionItem own = item;
    own.row = rows[i];
    Tile tile = make_tile(p, own, row_plan(p, own.row));
    tile.first_head = first_head;
    tile.num_heads = group;
    queries.add(p, tile);
    // With a window, a longer row may begin later.
    if (i == 0 || tile.begin < keys.begin) keys.begin = tile.begin;
    if (i == 0 || tile.end > keys.end) keys.end = tile.end;
  }
  load_queries(p, queries, scratch);
  stream_segment<T, S>(p, queries, Streams<S>(p, rows[0], item.kv_head), keys, &ahead, scratch);
  int m = 0;
  for (int i = 0; i < item.num_sharers; ++i) {
    const int64_t num_splits = row_plan(p, rows[i]).num_splits;
    const int64_t tokens = p.cu_seqlens[rows[i] + 1] - p.cu_seqlens[rows[i]];
    for (int64_t token = 0; token < tokens; ++token) {
      for (int64_t head = first_head; head < first_head + group; ++head, ++m) {
        write_partial(scratch, m, p.sizes.head_dim,
                      partial_of(p, work, rows[i], num_splits, item.split, token, head));
      }
    }
  }
}

template <typename T, typename S>
void run_item(const RaggedAttentionParams& p, const AttentionWork& work, const AttentionItem& item,
              ReadAhead<S>& ahead, AttentionScratch& scratch) {
  if (item.num_sharers > 0) return run_shared_item<T, S>(p, work, item, ahead, scratch);
  const AttentionRowPlan plan = row_plan(p, item.row);
  Tile tile = make_tile(p, item, plan);
  // A group of heads wider than a tile is processed in parts; after the first, its keys and values
  // are in the core's cache.
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  for (int64_t head = 0; head < group; head += kAttentionTileQueries) {
    tile.first_head = item.kv_head * group + head;
    tile.num_heads = group - head < kAttentionTileQueries ? group - head : kAttentionTileQueries;
    tile.count = tile.num_tokens * tile.num_heads;
    run_tile<T, S>(p, work, item, plan, tile, head == 0 ? &ahead : nullptr, scratch);
  }
}

// Merges the partial results of one query vector in the order of its segments.
template <typename T>
void merge_splits(const RaggedAttentionParams& p, const float* partials, int64_t num_splits,
                  bool sees, int64_t token, int64_t head) {
  const int64_t num_sums = attention_sums(p.sizes.head_dim);
  const int64_t size = attention_partial_size(p.sizes.head_dim);
  alignas(64) float sums[kMaxHeadDim] = {};
  Merged merged{sums, kNothing, 0.0f};
  for (int64_t s = 0; s < num_splits; ++s) {
    const float* partial = partials + s * size;
    merged.add(partial, partial[num_sums], partial[num_sums + 1], num_sums);
  }
  write_result<T>(p, token, head, sees, merged.sums, merged.maximum, merged.sum);
}

}  // namespace

void ragged_attention(const RaggedAttentionParams& p, const AttentionWork& work, int64_t begin,
                      int64_t end) {
  AttentionScratch scratch(p.sizes.head_dim);
  dispatch_dtype(p.dtype, [&]<typename T>() {
    [[maybe_unused]] const typename AttentionProducts<T>::Scope scope;
    const auto run = [&]<typename S>() {
      ReadAhead<S> ahead(p, work, begin, end);
      for (int64_t i = begin; i < end; ++i) {
        ahead.begin(i);
        run_item<T, S>(p, work, work.items[i], ahead, scratch);
      }
    };
    if (is_eight_bit(p.cache_dtype)) return run.template operator()<Int8>();
    run.template operator()<T>();
  });
}

// One item is one KV head of one row, so that threads share even a single long row.
void ragged_attention_merge(const RaggedAttentionParams& p, const AttentionWork& work,
                            int64_t begin, int64_t end) {
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  const int64_t size = attention_partial_size(p.sizes.head_dim);
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / p.sizes.num_kv_heads, kv_head = i % p.sizes.num_kv_heads;
      if (work.partial_offsets[row] < 0) continue;
      const int64_t first = p.cu_seqlens[row], tokens = p.cu_seqlens[row + 1] - first;
      const int64_t num_splits = row_plan(p, row).num_splits, length = p.lengths[row];
      const float* partials = work.partials + work.partial_offsets[row];
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
          merge_splits<T>(p, partials + (token * p.num_heads + head) * num_splits * size,
                          num_splits, length - tokens + token >= 0, first + token, head);
        }
      }
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
