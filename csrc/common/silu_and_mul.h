// silu_and_mul: y = silu(x[: d]) * x[d :], silu(a) = a / (1 + exp(-a)).
#pragma once

#include "common/dtype.h"

namespace baton {

struct SiluAndMulParams {
  const void* x;  // [num_rows, 2 * size], rows x_row_stride apart
  void* y;        // [num_rows, size], contiguous
  int64_t num_rows, size;
  int64_t x_row_stride;
  Dtype dtype;
};

// One work item is one row.
static inline int64_t silu_and_mul_work(const SiluAndMulParams& p) { return p.num_rows; }

}  // namespace baton
