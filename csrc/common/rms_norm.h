// rms_norm: y = s / sqrt(mean(s^2) + eps) * weight, with s = x, or x + residual rounded to dtype.
#pragma once

#include "common/dtype.h"

namespace baton {

struct RmsNormParams {
  const void* x;         // [num_rows, size], rows x_row_stride apart
  const void* residual;  // [num_rows, size] or null
  const void* weight;    // [size], contiguous
  void* y;               // [num_rows, size], contiguous
  void* sum;             // [num_rows, size], contiguous; null without residual
  int64_t num_rows, size;
  int64_t x_row_stride, residual_row_stride;
  float eps;
  Dtype dtype;
};

// One work item is one row.
static inline int64_t rms_norm_work(const RmsNormParams& p) { return p.num_rows; }

}  // namespace baton
