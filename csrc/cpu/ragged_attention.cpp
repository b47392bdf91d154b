// ragged_attention on the CPU: one work item is one (row, KV head, query tile, split). It streams
// its columns once, in blocks of kBlockKeys, with a running maximum and sum, so that scores exist
// for one block only. Padding columns are never loaded; hidden ones are skipped where a whole block
// is hidden.
#include "cpu/attention_ahead.h"
#include "cpu/attention_item.h"
#include "cpu/attention_tile_amx.h"
#include "cpu/exponential.h"
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

namespace {

constexpr float kNothing = -__builtin_inff();

// What turns the scores of one query vector into probabilities.
struct Softmax {
  Range range;       // keys that it sees
  int64_t position;  // its own
  float slope;
};

// Scale, softcap, ALiBi and mask of one query vector's scores for the block that begins at
// first_key.
BATON_INLINE void finish_scores(const RaggedAttentionParams& p, const float* scores,
                                const Softmax& softmax, int64_t first_key, int num_vecs,
                                Vec (&out)[kBlockVecs]) {
  const Vec scale = set1(p.scale);
  // Relative to the block, so that 32 bits are enough.
  const int64_t low = softmax.range.begin - first_key, high = softmax.range.end - first_key;
  BATON_UNROLL
  for (int i = 0; i < num_vecs; ++i) out[i] = load(scores + i * kLanes) * scale;
  if (low <= 0 && high >= kBlockKeys && p.softcap == 0.0f && !p.alibi_slopes) return;
  const int32_t from = low > 0 ? static_cast<int32_t>(low < kBlockKeys ? low : kBlockKeys) : 0;
  const int32_t to = high > 0 ? static_cast<int32_t>(high < kBlockKeys ? high : kBlockKeys) : 0;
  const float distance = static_cast<float>(softmax.position - first_key);
  IntVec key;
  for (int i = 0; i < kLanes; ++i) key[i] = i;
  for (int i = 0; i < num_vecs; ++i) {
    Vec s = out[i];
    if (p.softcap > 0.0f) s = set1(p.softcap) * tanh(s / set1(p.softcap));
    if (p.alibi_slopes) {
      s = s - set1(softmax.slope) * (set1(distance) - __builtin_convertvector(key, Vec));
    }
    out[i] = (key >= from) & (key < to) ? s : set1(kNothing);
    key += kLanes;
  }
}

// Probabilities are relative to a reference that follows the largest score lazily: what was summed
// before is rescaled only when a score exceeds it by this much. e^10 more costs a float nothing.
constexpr float kSlack = 10.0f;

// Turns the block's scores of query vector m, num_vecs vectors of them, into probabilities, and
// adds them to its sum.
BATON_INLINE void update_softmax(const RaggedAttentionParams& p, const Softmax& softmax,
                                 int64_t first_key, int num_vecs, int m,
                                 AttentionScratch& scratch) {
  float* scores = scratch.scores[m];
  Vec s[kBlockVecs];
  finish_scores(p, scores, softmax, first_key, num_vecs, s);
  Vec top = s[0];
  BATON_UNROLL
  for (int i = 1; i < num_vecs; ++i) top = max(s[i], top);
  const float old = scratch.maximum[m];
  if (any(top > set1(old + kSlack))) {
    const float now = reduce_max(top);
    scratch.maximum[m] = now;
    if (old != kNothing) {
      const Vec correction = exp(set1(old - now));
      store(scratch.sum[m], load(scratch.sum[m]) * correction);
      // To the end of the last 32: the sums may lie in an order of their own until finish().
      for (int64_t d = 0; d < (p.sizes.head_dim + 31) / 32 * 32; d += kLanes) {
        store(&scratch.out[m][d], load(&scratch.out[m][d]) * correction);
      }
    }
  }
  // Nothing seen yet: subtracting 0 keeps exp(-inf) = 0, and a NaN score stays one.
  const float reference = scratch.maximum[m];
  const Vec shift = set1(reference == kNothing ? 0.0f : reference);
  Vec total = load(scratch.sum[m]);
  BATON_UNROLL
  for (int i = 0; i < num_vecs; ++i) {
    const Vec probability = exp(s[i] - shift);
    store(scores + i * kLanes, probability);
    total = total + probability;
  }
  store(scratch.sum[m], total);
}

template <typename T>
const T* query_vector(const RaggedAttentionParams& p, const Tile& t, int64_t m) {
  const int64_t token = p.cu_seqlens[t.row] + t.token + m / t.num_heads;
  return static_cast<const T*>(p.query) +
         offset(p.query_strides, 0, token, t.first_head + m % t.num_heads);
}

// The same for a block of `count` keys: whole blocks in a loop that is unrolled, others in one that
// leaves out what they do not have.
void update_softmax_of(const RaggedAttentionParams& p, const Softmax& softmax, int64_t first_key,
                       int64_t count, int m, AttentionScratch& scratch) {
  if (count == kBlockKeys) {
    update_softmax(p, softmax, first_key, kBlockVecs, m, scratch);
  } else {
    update_softmax(p, softmax, first_key, static_cast<int>((count + kLanes - 1) / kLanes), m,
                   scratch);
  }
}

// Streams the tile's keys and values; leaves sums, maxima and totals in scratch. `ahead` asks for
// what will be streamed next; null where keys and values are not used straight from the cache.
template <typename T>
void stream(const RaggedAttentionParams& p, const Tile& t, const Streams<T>& from,
            ReadAhead<T>* ahead, AttentionScratch& scratch) {
  typedef AttentionProducts<T> Products;
  const int64_t dim = p.sizes.head_dim;
  const int count = static_cast<int>(t.count);
  const T* query[kMaxQueries];
  Softmax softmax[kMaxQueries];
  int m = 0;
  for (int64_t token = t.token; token < t.token + t.num_tokens; ++token) {
    Range range = visible(p, t, token);
    // Another split sees to what lies behind this one's end.
    if (range.end > t.end) range.end = t.end;
    for (int64_t head = t.first_head; head < t.first_head + t.num_heads; ++head, ++m) {
      query[m] = static_cast<const T*>(p.query) +
                 offset(p.query_strides, 0, p.cu_seqlens[t.row] + token, head);
      softmax[m].range = range;
      softmax[m].position = t.length - t.query_length + token;
      softmax[m].slope = p.alibi_slopes ? p.alibi_slopes[head] : 0.0f;
      scratch.maximum[m] = kNothing;
      store(scratch.sum[m], zero());
      // To the end of the last 32, as below.
      for (int64_t d = 0; d < (dim + 31) / 32 * 32; d += kLanes) store(&scratch.out[m][d], zero());
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
    for (int i = 0; i < count; ++i) update_softmax_of(p, softmax[i], first, here, i, scratch);
    const Rows<T> values{from.values + done * value_stride, value_stride, here, dim,
                         ahead ? ahead->step(here) : Ask<T>{}};
    Products::weigh(count, values, scratch);
  }
  Products::finish(count, dim, scratch);
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
  const Vec factor = set1(weight / total);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(sums + d) * factor);
  if (d < dim) store_partial(out + d, load_partial(sums + d, dim - d) * factor, dim - d);
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
      __builtin_memcpy(partial, scratch.out[m], dim * sizeof(float));
      partial[dim] = scratch.maximum[m];
      partial[dim + 1] = sum;
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
    const bool direct = AttentionProducts<T>::is_direct(tile.count) && head == 0;
    run_tile<T>(p, work, item, plan, tile, direct ? &ahead : nullptr, scratch);
  }
}

// Merges the partial results of one query vector in column order.
template <typename T>
void merge_splits(const RaggedAttentionParams& p, const float* partials, int64_t num_splits,
                  int64_t token, int64_t head) {
  const int64_t dim = p.sizes.head_dim, size = attention_partial_size(dim);
  float top = kNothing;
  bool saw = false;
  for (int64_t s = 0; s < num_splits; ++s) {
    const float maximum = partials[s * size + dim];
    top = maximum > top ? maximum : top;
    saw = saw || partials[s * size + dim + 1] != 0.0f;
  }
  alignas(64) float sums[kMaxHeadDim] = {};
  float sum = 0.0f;
  for (int64_t s = 0; s < num_splits && saw; ++s) {
    const float* partial = partials + s * size;
    if (partial[dim + 1] == 0.0f) continue;
    const float weight = exp(set1(partial[dim] - top))[0];
    sum += partial[dim + 1] * weight;
    for (int64_t d = 0; d < dim; ++d) sums[d] += partial[d] * weight;
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
