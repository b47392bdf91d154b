// merge_attention: exact combination of two attentions over disjoint keys, from their lse.
//   lse = log(exp(lse_a) + exp(lse_b));  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
#pragma once

#include "common/cache.h"
#include "common/dtype.h"

namespace baton {

struct MergeAttentionParams {
  const void* out_a;   // [num_queries, num_heads, head_dim]
  const void* out_b;   // as out_a
  const float* lse_a;  // [num_queries, num_heads], contiguous
  const float* lse_b;  // as lse_a
  void* out;           // [num_queries, num_heads, head_dim], contiguous
  float* lse;          // [num_queries, num_heads], contiguous
  int64_t num_queries, num_heads, head_dim;
  TokenStrides out_a_strides, out_b_strides;
  Dtype dtype;
};

// One work item is one query token.
static inline int64_t merge_attention_work(const MergeAttentionParams& p) { return p.num_queries; }

}  // namespace baton
