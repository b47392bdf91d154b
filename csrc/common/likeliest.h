// likeliest: the index of a row's largest element, the first of several; -1 if an element is NaN or
// infinite.
#pragma once

#include "common/dtype.h"

namespace baton {

struct LikeliestParams {
  const void* logits;  // [num_rows, size], rows row_stride apart
  int64_t* tokens;     // [num_rows]
  int64_t num_rows, size;
  int64_t row_stride;
  Dtype dtype;
};

// One work item is one row.
static inline int64_t likeliest_work(const LikeliestParams& p) { return p.num_rows; }

}  // namespace baton
