// linear from weights packed into panels. The sums are those of linear with their terms in another
// order, which is fixed as well.
//
// A panel holds all of in_features for 48 outputs, in the order in which a CPU reads them: float32
// and float16 as [in_features][48], bfloat16 as [ceil(in_features / 2)][48][2], pairs being what
// CPUs multiply. Outputs of the last panel that do not exist, and the second element of the last
// pair where in_features is odd, are 0.
//
// int8 panels are [ceil(in_features / 4)][48][4] with a scale per output. x is then rounded to int8
// as well, with a scale per kInt8Group elements of a row: a few elements are many times as large as
// the rest, and with one scale per row they would leave the rest only a few of the 8 bits. The sums
// of a group are exact in int32, in any order. Groups are added up in float32, in order, each by a
// product and an addition that are both rounded, because not every CPU has a fused operation. So
// every CPU computes the same bits.
#pragma once

#include "common/dtype.h"

namespace baton {

constexpr int64_t kPanelOutputs = 48;

static inline int64_t num_panels(int64_t out_features) {
  return (out_features + kPanelOutputs - 1) / kPanelOutputs;
}

// How many consecutive elements of one output a panel holds, and the bytes of each.
struct PanelLayout {
  int64_t terms, element_bytes;
};
static inline PanelLayout panel_layout(Dtype dtype) {
  return {dtype == Dtype::kBFloat16 ? 2 : 1, size_of(dtype)};
}
constexpr PanelLayout kInt8Panels{4, 1};
// The int8 elements in one row of an AMX tile. With a scale per group, int8 raises the perplexity
// of a text of bench/data by 0.2 %; with one scale per row it is 4.6 % (bench.weights).
constexpr int64_t kInt8Group = 64;

static inline int64_t num_int8_groups(int64_t in_features) {
  return in_features > 0 ? (in_features + kInt8Group - 1) / kInt8Group : 1;
}

static inline int64_t panel_bytes(const PanelLayout& layout, int64_t in_features) {
  const int64_t steps = (in_features + layout.terms - 1) / layout.terms;
  return steps * layout.terms * kPanelOutputs * layout.element_bytes;
}

// A group stores round(element / scale) for each element, within [-127, 127]. scale is the largest
// magnitude / 127. It is NaN where an element is not finite and 0 where all are nearly 0; all
// stored elements are then 0.
//
// Sums contain the weights as integers up to 127 until the weight's scale multiplies them at the
// very end. So that they stay within float32 for large x until then, the scales of groups are
// divided by this constant, and the end multiplies by it.
constexpr float kInt8Headroom = 128.0f;

struct QuantizedGroup {
  float scale;        // already divided by kInt8Headroom
  int32_t first_sum;  // where the int32 sums begin: 0, or a correction for the instruction set
};

// Each int8 row that linear_packed reads begins on a cache line and is padded with zeros to a whole
// number of lines. Rows are an odd number of lines apart: with an even number, many rows would
// share a few sets of the first-level cache.
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
  // Set for int8 panels, else null.
  const float* weight_scales;      // [out_features]
  const QuantizedGroup* x_groups;  // [num_rows][num_int8_groups(in_features)]
  int64_t num_rows, in_features, out_features;
  int64_t x_row_stride;
  // Work items per panel: 1, or the kernels' own number of parts where there are too few panels for
  // all threads.
  int64_t parts;
  // How many bytes before their use weights are prefetched where one pass of rows reads them; 0:
  // not at all.
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

// Rounds rows to int8: rows of x for linear_packed, or rows of a weight before it is packed.
struct QuantizeLinearParams {
  const void* x;           // [num_rows, in_features], rows x_row_stride apart
  int8_t* rounded;         // written: [num_rows, row_size], rows rounded_row_stride apart
  QuantizedGroup* groups;  // written: [num_rows][num_int8_groups(in_features)]; or null
  float* scales;           // written: [num_rows], where each row is one group; or null
  int64_t num_rows, in_features, x_row_stride;
  int64_t row_size;  // elements from in_features on are written as 0
  int64_t rounded_row_stride;
  Dtype dtype;  // of x
};

}  // namespace baton
