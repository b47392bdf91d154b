// linear on the CPU: y = x weight^T + bias with unpacked, row-major weights. For bfloat16 on CPUs
// with AMX see linear_amx.h.
//
// A register tile of dot products runs along in_features, with lanes along the sum: tile() here, or
// two rows per vector in linear_pairs.h where vectors are long. Every dot product adds its terms in
// the same order in every tile, so a row's bits do not depend on the number of rows. Weights stream
// from memory once per block of rows.
#include "cpu/kernels.h"
#include "cpu/linear_amx.h"
#include "cpu/linear_pairs.h"
#include "cpu/simd/dot.h"

namespace baton::cpu::BATON_ISA {

namespace {

#if defined(__AVX512F__)
// Only for the features that pair_column leaves over, fewer than eight.
constexpr int kTileRows = 6, kTileFeatures = 1;
#elif defined(__AVX2__)
// 8 accumulators, 2 weight vectors, row vectors from memory, of 16 registers.
constexpr int kTileRows = 4, kTileFeatures = 2;
#else
constexpr int kTileRows = 4, kTileFeatures = 2;
#endif

// With kAhead the weights of the next features are prefetched meanwhile: rows of weights are too
// short for the hardware prefetcher. Prefetching past the end of a tensor reads nothing.
template <typename T, int kRows, int kFeatures, bool kAhead>
void tile(const LinearParams& p, int64_t row, int64_t feature) {
  typedef Dot<T> D;
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  const T* weight = static_cast<const T*>(p.weight) + feature * p.weight_row_stride;
  Vec sums[kRows][kFeatures] = {};
  // Long sums are cut into stretches: a single chain of additions over all of in_features would
  // round too much.
  constexpr int64_t kStretch = 64 * D::kStep;
  int64_t k = 0;
  const int64_t whole = p.in_features / D::kStep * D::kStep;
  while (k < whole) {
    const int64_t end = k + kStretch < whole ? k + kStretch : whole;
    Vec stretch[kRows][kFeatures] = {};
    for (; k < end; k += D::kStep) {
      typename D::Operand w[kFeatures];
      BATON_UNROLL
      for (int n = 0; n < kFeatures; ++n) {
        w[n] = D::operand(weight + n * p.weight_row_stride + k);
        if (kAhead) __builtin_prefetch(weight + (n + kFeatures) * p.weight_row_stride + k, 0, 2);
      }
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        const typename D::Operand v = D::operand(x + m * p.x_row_stride + k);
        BATON_UNROLL
        for (int n = 0; n < kFeatures; ++n) stretch[m][n] = D::step(v, w[n], stretch[m][n]);
      }
    }
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      BATON_UNROLL
      for (int n = 0; n < kFeatures; ++n) sums[m][n] = sums[m][n] + stretch[m][n];
    }
  }
  if (const int64_t rest = p.in_features - k; rest > 0) {
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      const typename D::Operand v = D::operand_partial(x + m * p.x_row_stride + k, rest);
      BATON_UNROLL
      for (int n = 0; n < kFeatures; ++n) {
        sums[m][n] =
            D::step(v, D::operand_partial(weight + n * p.weight_row_stride + k, rest), sums[m][n]);
      }
    }
  }
  T* y = static_cast<T*>(p.y) + row * p.out_features + feature;
  const T* bias = p.bias ? static_cast<const T*>(p.bias) + feature : nullptr;
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kFeatures; ++n) {
      float total = reduce_add(sums[m][n]);
      if (bias) total += to_float(bias[n]);
      store_partial(y + m * p.out_features + n, set1(total), 1);
    }
  }
}

template <typename T, int kFeatures>
void tile_column(const LinearParams& p, int64_t row, int64_t row_end, int64_t feature) {
  // Up to kTileRows rows share a pass over the weights; the first pass prefetches the next weights.
  const auto pass = [&]<bool kAhead>(int64_t rows) {
    if (rows >= kTileRows) return tile<T, kTileRows, kFeatures, kAhead>(p, row, feature);
    const auto rest = [&]<int kRows>() { tile<T, kRows, kFeatures, kAhead>(p, row, feature); };
    if constexpr (kTileRows == 6) {
      dispatch_int<1, 2, 3, 4, 5>(rows, rest);
    } else {
      dispatch_int<1, 2, 3>(rows, rest);
    }
  };
  pass.template operator()<true>(row_end - row);
  for (row += kTileRows; row < row_end; row += kTileRows) {
    pass.template operator()<false>(row_end - row);
  }
}

template <typename T>
void block(const LinearParams& p, int64_t row, int64_t row_end, int64_t feature,
           int64_t feature_end) {
#if defined(__AVX512F__)
  for (; feature + kPairFeatures <= feature_end; feature += kPairFeatures) {
    pair_column<T>(p, row, row_end, feature);
  }
#endif
  for (; feature + kTileFeatures <= feature_end; feature += kTileFeatures) {
    tile_column<T, kTileFeatures>(p, row, row_end, feature);
  }
  for (; feature < feature_end; ++feature) tile_column<T, 1>(p, row, row_end, feature);
}

}  // namespace

void linear_pack([[maybe_unused]] const LinearParams& p, [[maybe_unused]] int64_t begin,
                 [[maybe_unused]] int64_t end) {
#if defined(BATON_HAS_TILES)
  pack_rows(p, begin, end);
#endif
}

void linear(const LinearParams& p, int64_t begin, int64_t end) {
  const int64_t feature_blocks = linear_feature_blocks(p);
  // Calls fn(row, row_end, feature, feature_end) for every item.
  const auto each_item = [&](auto&& fn) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / feature_blocks * kLinearRowBlock;
      const int64_t feature = i % feature_blocks * kLinearFeatureBlock;
      const int64_t row_end =
          row + kLinearRowBlock < p.num_rows ? row + kLinearRowBlock : p.num_rows;
      const int64_t feature_end = feature + kLinearFeatureBlock < p.out_features
                                      ? feature + kLinearFeatureBlock
                                      : p.out_features;
      fn(row, row_end, feature, feature_end);
    }
  };
  dispatch_dtype(p.dtype, [&]<typename T>() {
#if defined(BATON_HAS_TILES)
    if constexpr (__is_same(T, BFloat16)) {
      const TileScope tiles(linear_tile_rows(p));
      return each_item([&](auto... bounds) { linear_block(p, bounds...); });
    } else
#endif
      each_item([&](auto... bounds) { block<T>(p, bounds...); });
  });
}

}  // namespace baton::cpu::BATON_ISA
