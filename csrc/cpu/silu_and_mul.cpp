// silu_and_mul on the CPU: one work item is one row.
#include "cpu/exponential.h"
#include "cpu/kernels.h"
#include "cpu/stream.h"

namespace baton::cpu::BATON_ISA {

namespace {

BATON_INLINE Vec silu(Vec x) { return x / (set1(1.0f) + exp(-x)); }

template <typename T, bool kStreams>
void silu_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* up = gate + p.size;
  T* y = static_cast<T*>(p.y) + row * p.size;
  const int64_t whole = p.size / kLanes * kLanes, rest = p.size - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const Vec result = silu(load(gate + i)) * load(up + i);
    if constexpr (kStreams) {
      stream(y + i, result);
      // Each row's halves are runs of their own, which the hardware does not foresee.
      __builtin_prefetch(gate + p.x_row_stride + i, 0, 2);
      __builtin_prefetch(up + p.x_row_stride + i, 0, 2);
    } else {
      store(y + i, result);
    }
  }
  if (rest > 0) {
    store_partial(y + whole,
                  silu(load_partial(gate + whole, rest)) * load_partial(up + whole, rest), rest);
  }
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    if (streams(static_cast<const T*>(p.y), p.num_rows, p.size)) {
      for (int64_t row = begin; row < end; ++row) silu_row<T, true>(p, row);
      end_stream();
    } else {
      for (int64_t row = begin; row < end; ++row) silu_row<T, false>(p, row);
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
