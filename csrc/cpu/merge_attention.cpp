// merge_attention on the CPU: one work item is one query token. A partial result that saw no key
// (lse = -inf) is not read, so its output may hold anything.
#include "cpu/kernels.h"
#include "cpu/simd/exponential.h"

namespace baton::cpu::BATON_ISA {

namespace {

float exp_of(float x) { return exp(set1(x))[0]; }

template <typename T>
void merge_head(const T* a, const T* b, float lse_a, float lse_b, T* out, float* lse, int64_t dim) {
  const float nothing = -__builtin_inff();
  if (lse_a == nothing || lse_b == nothing) {
    *lse = lse_a == nothing ? lse_b : lse_a;
    if (*lse == nothing) {
      __builtin_memset(out, 0, dim * sizeof(T));
    } else {
      __builtin_memcpy(out, lse_a == nothing ? b : a, dim * sizeof(T));
    }
    return;
  }
  const float top = lse_a > lse_b ? lse_a : lse_b;
  const float weight_a = exp_of(lse_a - top), weight_b = exp_of(lse_b - top);
  const float total = weight_a + weight_b;
  *lse = top + __builtin_logf(total);
  const Vec share_a = set1(weight_a / total), share_b = set1(weight_b / total);
  for (int64_t i = 0; i < dim; i += kLanes) {
    const int64_t n = dim - i;
    if (n >= kLanes) {
      store(out + i, fmadd(load(a + i), share_a, load(b + i) * share_b));
    } else {
      store_partial(out + i,
                    fmadd(load_partial(a + i, n), share_a, load_partial(b + i, n) * share_b), n);
    }
  }
}

}  // namespace

void merge_attention(const MergeAttentionParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t query = begin; query < end; ++query) {
      for (int64_t head = 0; head < p.num_heads; ++head) {
        const int64_t index = query * p.num_heads + head;
        merge_head(static_cast<const T*>(p.out_a) + query * p.out_a_strides.token_stride +
                       head * p.out_a_strides.head_stride,
                   static_cast<const T*>(p.out_b) + query * p.out_b_strides.token_stride +
                       head * p.out_b_strides.head_stride,
                   p.lse_a[index], p.lse_b[index], static_cast<T*>(p.out) + index * p.head_dim,
                   p.lse + index, p.head_dim);
      }
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
