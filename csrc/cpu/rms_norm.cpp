// rms_norm on the CPU: one work item is one row, read twice from the core's private cache.
#include "cpu/kernels.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/stream.h"

namespace baton::cpu::BATON_ISA {

namespace {

// The inputs and outputs of one row.
template <typename T>
struct Row {
  const T* x;
  const T* residual;  // or null
  const T* weight;
  T* y;
  T* sum;  // null without residual
};

// s for kLanes elements; stores it if there is a residual.
template <typename T>
BATON_INLINE Vec total(const Row<T>& r, int64_t i) {
  Vec s = load(r.x + i);
  if (r.residual) {
    s = round_to<T>(s + load(r.residual + i));
    store(r.sum + i, s);
  }
  return s;
}

template <typename T, bool kStreams>
void norm_row(const RmsNormParams& p, int64_t row) {
  const Row<T> r = {
      static_cast<const T*>(p.x) + row * p.x_row_stride,
      p.residual ? static_cast<const T*>(p.residual) + row * p.residual_row_stride : nullptr,
      static_cast<const T*>(p.weight), static_cast<T*>(p.y) + row * p.size,
      p.residual ? static_cast<T*>(p.sum) + row * p.size : nullptr};
  const int64_t whole = p.size / kLanes * kLanes, rest = p.size - whole;

  // Four partial sums, so that four additions are in flight; their order is fixed.
  Vec squares[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * kLanes <= whole; i += 4 * kLanes) {
    BATON_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vec s = total(r, i + j * kLanes);
      squares[j] = fmadd(s, s, squares[j]);
    }
  }
  for (int j = 0; i < whole; i += kLanes, ++j) {
    const Vec s = total(r, i);
    squares[j] = fmadd(s, s, squares[j]);
  }
  if (rest > 0) {
    Vec s = load_partial(r.x + whole, rest);
    if (r.residual) {
      s = round_to<T>(s + load_partial(r.residual + whole, rest));
      store_partial(r.sum + whole, s, rest);
    }
    squares[0] = fmadd(s, s, squares[0]);
  }
  const float sum = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const Vec inverse = set1(1.0f / __builtin_sqrtf(sum / static_cast<float>(p.size) + p.eps));

  const T* source = r.residual ? r.sum : r.x;
  const auto result = [&](int64_t at) BATON_INLINE_LAMBDA {
    return load(source + at) * inverse * load(r.weight + at);
  };
  if constexpr (kStreams) {
    for (i = 0; i < p.size; i += kStreamStep) {
      stream(r.y + i, result(i), result(i + kLanes));
      // The next row comes from memory meanwhile: this loop reads what is in the core's cache.
      __builtin_prefetch(r.x + p.x_row_stride + i, 0, 2);
    }
    return;
  }
  for (i = 0; i < whole; i += kLanes) store(r.y + i, result(i));
  if (rest > 0) {
    store_partial(
        r.y + whole,
        load_partial(source + whole, rest) * inverse * load_partial(r.weight + whole, rest), rest);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    if (streams(static_cast<const T*>(p.y), p.num_rows, p.size)) {
      for (int64_t row = begin; row < end; ++row) norm_row<T, true>(p, row);
      end_stream();
    } else {
      for (int64_t row = begin; row < end; ++row) norm_row<T, false>(p, row);
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
