// likeliest on the CPU: one work item is one row, read once; the block with the largest element is
// read again to find it.
#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Vectors that are compared at the same time, and elements of a block.
constexpr int kAtOnce = 4;
constexpr int64_t kBlock = 8 * kAtOnce * kLanes;

template <typename T>
int64_t likeliest_of(const T* x, int64_t size) {
  float best = -__builtin_inff();
  int64_t block = 0, i = 0;
  // 0 times an element is 0, unless it is NaN or infinite.
  Vec poison[kAtOnce] = {};
  for (; i + kBlock <= size; i += kBlock) {
    Vec largest[kAtOnce];
    BATON_UNROLL
    for (int j = 0; j < kAtOnce; ++j) largest[j] = set1(best);
    for (int64_t k = i; k < i + kBlock; k += kAtOnce * kLanes) {
      BATON_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const Vec v = load(x + k + j * kLanes);
        largest[j] = max(largest[j], v);
        poison[j] = fmadd(v, zero(), poison[j]);
      }
    }
    const float top = reduce_max(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
    if (top > best) best = top, block = i;
  }
  float rest = reduce_add((poison[0] + poison[1]) + (poison[2] + poison[3]));
  for (; i < size; ++i) {
    const float element = to_float(x[i]);
    if (element > best) best = element, block = i;
    rest += 0.0f * element;
  }
  if (rest != 0.0f) return -1;
  while (to_float(x[block]) != best) ++block;
  return block;
}

}  // namespace

void likeliest(const LikeliestParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t row = begin; row < end; ++row) {
      p.tokens[row] = likeliest_of(static_cast<const T*>(p.logits) + row * p.row_stride, p.size);
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
