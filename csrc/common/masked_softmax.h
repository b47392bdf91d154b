// masked_softmax: softmax(scale * scores) over the columns that a query sees, 0 in all others.
// Query j of row i stands in column c_q = starts[i] + lengths[i] - query_length + j and sees column
// c when starts[i] <= c <= c_q and c > c_q - window.
#pragma once

#include "common/dtype.h"

namespace baton {

struct MaskedSoftmaxParams {
  const void* scores;      // [num_rows, num_heads, query_length, key_length]
  const int32_t* starts;   // [num_rows]
  const int32_t* lengths;  // [num_rows]
  void* weights;           // as scores, contiguous
  int64_t num_rows, num_heads, query_length, key_length;
  int64_t row_stride, head_stride, query_stride;  // of scores
  int64_t window;                                 // 0: no window
  float scale;
  Dtype dtype;
};

// One work item is one (row, head, query).
static inline int64_t masked_softmax_work(const MaskedSoftmaxParams& p) {
  return p.num_rows * p.num_heads * p.query_length;
}

}  // namespace baton
