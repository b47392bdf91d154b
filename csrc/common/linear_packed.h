// linear from weights packed to panels: the sums of linear in another order of their terms, one
// that is fixed as well.
//
// A panel holds all of in_features for 48 outputs, in the order in which a CPU reads them: float32
// and float16 as [in_features][48], bfloat16 as [ceil(in_features / 2)][48][2], pairs being what
// CPUs multiply. Outputs of the last panel that do not exist, and the second element of the last
// pair where in_features is odd, are 0.
#pragma once

#include "common/dtype.h"

namespace baton {

constexpr int64_t kPanelOutputs = 48;

static inline int64_t num_panels(int64_t out_features) {
  return (out_features + kPanelOutputs - 1) / kPanelOutputs;
}
// Elements that a panel holds of one output in succession.
static inline int64_t panel_terms(Dtype dtype) { return dtype == Dtype::kBFloat16 ? 2 : 1; }
static inline int64_t panel_bytes(Dtype dtype, int64_t in_features) {
  const int64_t terms = panel_terms(dtype);
  return (in_features + terms - 1) / terms * terms * kPanelOutputs * size_of(dtype);
}

struct LinearPackedParams {
  const void* x;       // [num_rows, in_features], rows x_row_stride apart
  const void* panels;  // num_panels(out_features) of them
  const void* bias;    // [out_features] or null
  void* y;             // [num_rows, out_features], contiguous
  int64_t num_rows, in_features, out_features;
  int64_t x_row_stride;
  // Work items of a panel: 1, or the kernels' own number of parts where panels are too few for
  // all threads.
  int64_t parts;
  // How many bytes ahead of their use weights are asked for where one pass of rows reads them; 0
  // for not at all.
  int64_t read_ahead;
  Dtype dtype;
};

// A block of rows reads each panel from memory once.
constexpr int64_t kPackedRowBlock = 96;

static inline int64_t linear_packed_work(const LinearPackedParams& p) {
  return num_panels(p.out_features) * p.parts *
         ((p.num_rows + kPackedRowBlock - 1) / kPackedRowBlock);
}

// pack_linear and unpack_linear move elements and compute nothing.
struct PackLinearParams {
  const void* weight;  // [out_features, in_features], rows weight_row_stride apart
  void* panels;        // written
  int64_t in_features, out_features, weight_row_stride;
  Dtype dtype;
};

struct UnpackLinearParams {
  const void* panels;
  const int32_t* outputs;  // [num_outputs], which ones; or null for all in order
  void* weight;            // [num_outputs, in_features], contiguous
  int64_t in_features, num_outputs;
  Dtype dtype;
};

}  // namespace baton
