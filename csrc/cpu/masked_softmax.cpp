// masked_softmax on the CPU: one work item writes the key_length weights of one query, each once.
#include "common/masked_softmax.h"

#include "cpu/kernels.h"
#include "cpu/simd/exponential.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Loads `count` scores; lanes after them are -inf.
template <typename T>
BATON_INLINE Vec load_scores(const T* scores, int64_t count, Vec scale) {
  if (count >= kLanes) return load(scores) * scale;
  Vec score = load_partial(scores, count) * scale;
  for (int64_t lane = count; lane < kLanes; ++lane) score[lane] = -__builtin_inff();
  return score;
}

template <typename T>
void weigh(const T* scores, T* weights, int64_t count, float factor) {
  const Vec scale = set1(factor);
  Vec peaks = set1(-__builtin_inff());
  for (int64_t i = 0; i < count; i += kLanes) {
    peaks = max(peaks, load_scores(scores + i, count - i, scale));
  }
  const float top = reduce_max(peaks);
  // Where every score is -inf, subtracting 0 makes each weight 0, not NaN.
  const Vec peak = set1(top == -__builtin_inff() ? 0.0f : top);
  Vec totals = zero();
  for (int64_t i = 0; i < count; i += kLanes) {
    totals = totals + exp(load_scores(scores + i, count - i, scale) - peak);
  }
  const float total = reduce_add(totals);
  const Vec inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Vec weight = exp(load_scores(scores + i, count - i, scale) - peak) * inverse;
    if (count - i >= kLanes) {
      store(weights + i, weight);
    } else {
      store_partial(weights + i, weight, count - i);
    }
  }
}

template <typename T>
void softmax_line(const MaskedSoftmaxParams& p, int64_t index) {
  const int64_t query = index % p.query_length;
  const int64_t head = index / p.query_length % p.num_heads;
  const int64_t row = index / p.query_length / p.num_heads;
  const int64_t start = p.starts[row];
  const int64_t own_column = start + p.lengths[row] - p.query_length + query;
  int64_t first = start, last = own_column + 1;
  if (p.window > 0 && own_column - p.window + 1 > first) first = own_column - p.window + 1;
  if (last < first) last = first;
  const T* scores = static_cast<const T*>(p.scores) + row * p.row_stride + head * p.head_stride +
                    query * p.query_stride;
  T* weights = static_cast<T*>(p.weights) + index * p.key_length;
  for (int64_t c = 0; c < first; ++c) weights[c] = T{};
  // Lanes count from the first visible column: a row's bits do not depend on where it starts.
  weigh(scores + first, weights + first, last - first, p.scale);
  for (int64_t c = last; c < p.key_length; ++c) weights[c] = T{};
}

}  // namespace

void masked_softmax(const MaskedSoftmaxParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t i = begin; i < end; ++i) softmax_line<T>(p, i);
  });
}

}  // namespace baton::cpu::BATON_ISA
