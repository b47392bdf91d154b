// linear from weights packed to panels: the sums of linear in another order of their terms, one
// that is fixed as well.
//
// A panel holds all of in_features for 48 outputs, in the order in which a CPU reads them: float32
// and float16 as [in_features][48], bfloat16 as [ceil(in_features / 2)][48][2], pairs being what
// CPUs multiply. Outputs of the last panel that do not exist, and the second element of the last
// pair where in_features is odd, are 0.
//
// int8 panels are [ceil(in_features / 4)][48][4] with a scale per output. x is rounded to int8
// then, with a scale for each kInt8Group elements of a row: few elements are many times as large as
// the others, and with one scale per row they would leave the others few of the 8 bits. The sums of
// a group are exact in int32, in any order. Groups are added up in float32 in their order,
// each by a product and an addition, rounded both: a fused operation is not every CPU's. So every
// CPU has the same bits.
#pragma once

#include "common/dtype.h"

namespace baton {

constexpr int64_t kPanelOutputs = 48;

static inline int64_t num_panels(int64_t out_features) {
  return (out_features + kPanelOutputs - 1) / kPanelOutputs;
}

// Elements that a panel holds of one output in succession, and the bytes of each.
struct PanelLayout {
  int64_t terms, element_bytes;
};
static inline PanelLayout panel_layout(Dtype dtype) {
  return {dtype == Dtype::kBFloat16 ? 2 : 1, size_of(dtype)};
}
constexpr PanelLayout kInt8Panels{4, 1};
// As many as an AMX tile has of a row. On a text of bench/data int8 raises perplexity by 0.2 % with
// it, and by 4.6 % with one scale per row (bench.weights).
constexpr int64_t kInt8Group = 64;

static inline int64_t num_int8_groups(int64_t in_features) {
  return in_features > 0 ? (in_features + kInt8Group - 1) / kInt8Group : 1;
}

static inline int64_t panel_bytes(const PanelLayout& layout, int64_t in_features) {
  const int64_t steps = (in_features + layout.terms - 1) / layout.terms;
  return steps * layout.terms * kPanelOutputs * layout.element_bytes;
}

// A group of elements is round(element / scale), each from -127 to 127. scale is the largest one's
// magnitude / 127; NaN where one is not finite and 0 where all are nearly 0, of groups that are
// then 0 throughout.
//
// A product has 127 times the scale of the weight, by which it is multiplied last. For large x to
// stay within float32 until then, scales of groups lack a factor that comes in the end.
constexpr float kInt8Headroom = 128.0f;

struct QuantizedGroup {
  float scale;        // divided by kInt8Headroom
  int32_t first_sum;  // what sums of products begin with: 0, or the instruction set's own
};

// Rows of int8 that linear_packed reads begin on a line each, and are 0 from in_features to the end
// of theirs. An odd number of lines apart: an even one would have many rows share few sets of the
// first-level cache.
constexpr int64_t kInt8RowStep = 64;
static inline int64_t int8_row_size(int64_t in_features) {
  return (in_features + kInt8RowStep - 1) / kInt8RowStep * kInt8RowStep;
}
static inline int64_t int8_row_stride(int64_t in_features) {
  return int8_row_size(in_features) | kInt8RowStep;
}

struct LinearPackedParams {
  const void* x;       // [num_rows, in_features], rows x_row_stride apart; int8 with int8 panels
  const void* panels;  // num_panels(out_features) of them
  const void* bias;    // [out_features] or null
  void* y;             // [num_rows, out_features], contiguous
  // Of int8 panels, else null.
  const float* weight_scales;      // [out_features]
  const QuantizedGroup* x_groups;  // [num_rows][num_int8_groups(in_features)]
  int64_t num_rows, in_features, out_features;
  int64_t x_row_stride;
  // Work items of a panel: 1, or the kernels' own number of parts where panels are too few for
  // all threads.
  int64_t parts;
  // How many bytes ahead of their use weights are asked for where one pass of rows reads them; 0
  // for not at all.
  int64_t read_ahead;
  Dtype dtype;  // of y and bias, and of x and panels that are not int8
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
  PanelLayout layout;
};

struct UnpackLinearParams {
  const void* panels;
  const int32_t* outputs;  // [num_outputs], which ones; or null for all in order
  void* weight;            // [num_outputs, in_features], contiguous
  int64_t in_features, num_outputs;
  PanelLayout layout;
};

// Rounds rows to int8: of x for linear_packed, of a weight before it is packed.
struct QuantizeLinearParams {
  const void* x;           // [num_rows, in_features], rows x_row_stride apart
  int8_t* rounded;         // written: [num_rows, row_size], rows rounded_row_stride apart
  QuantizedGroup* groups;  // written: [num_rows][num_int8_groups(in_features)]; or null
  float* scales;           // written: [num_rows], of rows that are one group each; or null
  int64_t num_rows, in_features, x_row_stride;
  int64_t row_size;  // from in_features on 0 is written
  int64_t rounded_row_stride;
  Dtype dtype;  // of x
};

}  // namespace baton
