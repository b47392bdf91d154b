// linear: y[i, n] = sum_k x[i, k] weight[n, k] + bias[n], every sum in one fixed order, so that the
// bits of row i do not depend on how many rows there are.
#pragma once

#include "common/dtype.h"

namespace baton {

struct LinearParams {
  const void* x;       // [num_rows, in_features], rows x_row_stride apart
  const void* weight;  // [out_features, in_features], rows weight_row_stride apart
  const void* bias;    // [out_features] or null
  void* y;             // [num_rows, out_features], contiguous
  float* packed_x;     // pairs of bfloat16, written by linear_pack; null where x is used as it is
  int64_t num_rows, in_features, out_features;
  int64_t x_row_stride, weight_row_stride;
  Dtype dtype;
};

// One work item is one block of output features times one block of rows. Each block of weights is
// read from memory once per row block and then stays in the core's private caches.
constexpr int64_t kLinearRowBlock = 96;
constexpr int64_t kLinearFeatureBlock = 32;

// For kernels that multiply in tiles: the rows of x in a tile, the number of tiles, and the size of
// a packed tile. Fewer rows than a tile holds make a narrower tile, which takes less cache.
constexpr int64_t kLinearTileRows = 16;

static inline int linear_tile_rows(const LinearParams& p) {
  return static_cast<int>(p.num_rows < kLinearTileRows ? p.num_rows : kLinearTileRows);
}
static inline int64_t linear_row_tiles(const LinearParams& p) {
  return (p.num_rows + kLinearTileRows - 1) / kLinearTileRows;
}
static inline int64_t linear_packed_size(const LinearParams& p) {
  return (p.in_features + 31) / 32 * 16 * linear_tile_rows(p);
}

static inline int64_t linear_feature_blocks(const LinearParams& p) {
  return (p.out_features + kLinearFeatureBlock - 1) / kLinearFeatureBlock;
}
static inline int64_t linear_work(const LinearParams& p) {
  return linear_feature_blocks(p) * ((p.num_rows + kLinearRowBlock - 1) / kLinearRowBlock);
}

}  // namespace baton
