// silu_and_mul on the CPU: one work item is one row.
#include "cpu/kernels.h"
#include "cpu/simd/exponential.h"
#include "cpu/simd/stream.h"

namespace baton::cpu::BATON_ISA {

namespace {

template <typename T>
BATON_INLINE Vec silu_times(Vec gate, Vec up) {
  return gate * sigmoid<T>(gate) * up;
}

template <typename T>
void silu_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* up = gate + p.size;
  T* y = static_cast<T*>(p.y) + row * p.size;
  const int64_t whole = p.size / kLanes * kLanes, rest = p.size - whole;
  for (int64_t i = 0; i < whole; i += kLanes) {
    store(y + i, silu_times<T>(load(gate + i), load(up + i)));
  }
  if (rest > 0) {
    store_partial(y + whole,
                  silu_times<T>(load_partial(gate + whole, rest), load_partial(up + whole, rest)),
                  rest);
  }
}

// The same past the caches; size is a multiple of kStreamStep.
template <typename T>
void stream_silu_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* up = gate + p.size;
  T* y = static_cast<T*>(p.y) + row * p.size;
  for (int64_t i = 0; i < p.size; i += kStreamStep) {
    stream(y + i, silu_times<T>(load(gate + i), load(up + i)),
           silu_times<T>(load(gate + i + kLanes), load(up + i + kLanes)));
    // Each row's halves are separate runs, which the hardware does not foresee.
    __builtin_prefetch(gate + p.x_row_stride + i, 0, 2);
    __builtin_prefetch(up + p.x_row_stride + i, 0, 2);
  }
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    if (streams(static_cast<const T*>(p.y), p.num_rows, p.size)) {
      for (int64_t row = begin; row < end; ++row) stream_silu_row<T>(p, row);
      end_stream();
    } else {
      for (int64_t row = begin; row < end; ++row) silu_row<T>(p, row);
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
