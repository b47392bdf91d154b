// rms_norm on the CPU: one work item is one row, read twice from the core's own cache.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace baton::cpu::BATON_ISA {

namespace {

template <typename T>
void norm_row(const RmsNormParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* residual =
      p.residual ? static_cast<const T*>(p.residual) + row * p.residual_row_stride : nullptr;
  const T* weight = static_cast<const T*>(p.weight);
  T* y = static_cast<T*>(p.y) + row * p.size;
  T* sum = p.residual ? static_cast<T*>(p.sum) + row * p.size : nullptr;
  const int64_t whole = p.size / kLanes * kLanes, rest = p.size - whole;

  // Four partial sums, so that four additions are in flight; their order is fixed.
  Vec squares[4] = {zero(), zero(), zero(), zero()};
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec s = load(x + i);
    if (residual) {
      s = round_to<T>(s + load(residual + i));
      store(sum + i, s);
    }
    Vec& lane = squares[i / kLanes % 4];
    lane = fmadd(s, s, lane);
  }
  if (rest > 0) {
    Vec s = load_partial(x + whole, rest);
    if (residual) {
      s = round_to<T>(s + load_partial(residual + whole, rest));
      store_partial(sum + whole, s, rest);
    }
    squares[0] = fmadd(s, s, squares[0]);
  }
  const float total = reduce_add((squares[0] + squares[1]) + (squares[2] + squares[3]));
  const Vec inverse = set1(1.0f / __builtin_sqrtf(total / static_cast<float>(p.size) + p.eps));

  const T* source = residual ? sum : x;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, load(source + i) * inverse * load(weight + i));
  }
  if (rest > 0) {
    store_partial(y + whole,
                  load_partial(source + whole, rest) * inverse * load_partial(weight + whole, rest),
                  rest);
  }
}

}  // namespace

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t row = begin; row < end; ++row) norm_row<T>(p, row);
  });
}

}  // namespace baton::cpu::BATON_ISA
