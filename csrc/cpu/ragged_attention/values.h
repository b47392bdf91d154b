// The product of one block's probabilities with its values, and both products for each type.
//
// A block's sum starts from zero and adds its keys in order; it is then added to the segment's sum.
// Small terms would be lost if they were added one by one to a long total. Where a block's sums do
// not fit in registers, they are kept in scratch.block, in the same order.
//
// BlockProducts<T> is defined for every type; tile_bf16.h specializes it for CPUs that multiply
// bfloat16 directly.
#pragma once

#include "cpu/ragged_attention/scores.h"

namespace baton::cpu::BATON_ISA {

// A range of the block's rows.
struct Columns {
  int64_t begin, end;
};

// Where a block's sums go: partial sums wait in `block`, and once the last row has been added they
// are added to `out`.
struct Sums {
  Matrix out, block;

  BATON_INLINE Sums operator+(int64_t m) const { return {out + m, block + m}; }
};

// out[m][d ..] += sum_k p[m][k] value[k][d ..] over these rows, for kQueries query vectors and
// kVecs vectors of d; before(k) is called before row k.
template <int kQueries, int kVecs, typename BlockRows, typename Before>
BATON_INLINE void weigh(const float (*p)[kBlockKeys], const BlockRows& values, Columns rows,
                        Sums to, int64_t d, Before&& before) {
  Vec sums[kQueries][kVecs] = {};
  if (rows.begin > values.first) {
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int i = 0; i < kVecs; ++i) sums[m][i] = load(&to.block[m][d + i * kLanes]);
    }
  }
  const typename BlockRows::Element* value = nullptr;
  if constexpr (!BlockRows::kScattered) value = values.row(rows.begin) + d;
  for (int64_t k = rows.begin; k < rows.end; ++k) {
    if constexpr (BlockRows::kScattered) value = values.row(k) + d;
    before(k);
    Vec v[kVecs];
    BATON_UNROLL
    for (int i = 0; i < kVecs; ++i) v[i] = load(value + i * kLanes);
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const Vec weight = set1(p[m][k]);
      BATON_UNROLL
      for (int i = 0; i < kVecs; ++i) sums[m][i] = fmadd(weight, v[i], sums[m][i]);
    }
    // One addition per row where the distance is fixed; float32 was a fifth slower with a product.
    if constexpr (!BlockRows::kScattered) value += values.stride;
  }
  const bool is_last = rows.end == values.count;
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    BATON_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      if (is_last) {
        float* total = &to.out[m][d + i * kLanes];
        store(total, load(total) + sums[m][i]);
      } else {
        store(&to.block[m][d + i * kLanes], sums[m][i]);
      }
    }
  }
}

// The same for the last elements of head_dim, which fill less than a vector.
template <int kQueries, typename BlockRows>
BATON_INLINE void weigh_rest(const float (*p)[kBlockKeys], const BlockRows& values, Columns rows,
                             Sums to, int64_t d) {
  for (int m = 0; m < kQueries; ++m) {
    Vec sum = rows.begin > values.first ? load(&to.block[m][d]) : zero();
    for (int64_t k = rows.begin; k < rows.end; ++k) {
      sum = fmadd(set1(p[m][k]), load_partial(values.row(k) + d, values.dim - d), sum);
    }
    if (rows.end == values.count) {
      store(&to.out[m][d], load(&to.out[m][d]) + sum);
    } else {
      store(&to.block[m][d], sum);
    }
  }
}

// All of head_dim, kVecs vectors of it at a time.
template <int kQueries, int kVecs, typename BlockRows, typename Before>
BATON_INLINE void weigh_columns(const float (*p)[kBlockKeys], const BlockRows& values, Columns rows,
                                Sums to, Before&& before) {
  int64_t d = 0;
  for (; d + kVecs * kLanes <= values.dim; d += kVecs * kLanes) {
    weigh<kQueries, kVecs>(p, values, rows, to, d, before);
  }
  for (; d + kLanes <= values.dim; d += kLanes) {
    weigh<kQueries, 1>(p, values, rows, to, d, before);
  }
  if (d < values.dim) weigh_rest<kQueries>(p, values, rows, to, d);
}

// For many query vectors: each pass over the block's rows computes all sums that fit into
// registers. `stored`: the rows before they were unpacked, for prefetching.
template <typename T, typename Stored>
void weigh_packed(const float (*p)[kBlockKeys], int count, const Rows<T>& values,
                  const Rows<Stored>& stored, Matrix out) {
  for_query_tiles<kPackedTile>(count, [&]<int kQueries>(int m) {
    weigh_columns<kQueries, kPackedVecs>(p + m, values, {values.first, values.count}, {out + m, {}},
                                         stored.share(m, kQueries, count));
  });
}

// For few query vectors. If all sums fit in registers, one pass streams the block. Otherwise
// sixteen rows at a time stay in the first-level cache while pairs of query vectors pass over them.
// Pairs, because sums over all of head_dim then fit in registers, and rows are read in address
// order.
template <typename BlockRows, typename Softmax>
void weigh_direct(int count, const BlockRows& values, Softmax& softmax, AttentionScratch& scratch) {
  const float (*p)[kBlockKeys] = scratch.scores;
  const Sums to{scratch.out, scratch.block};
  if (values.dim == kPackedVecs * kLanes && count <= kDirectTile) {
    const auto before = [&](int64_t k) BATON_INLINE_LAMBDA {
      softmax.until(k + 1);
      values.template used<1>(k);
    };
    dispatch_int<1, 2, 3, 4>(count, [&]<int kQueries>() {
      weigh<kQueries, kPackedVecs>(p, values, {values.first, values.count}, to, 0, before);
    });
    return;
  }
  constexpr int64_t kColumns = 16;
  for (int64_t k = values.first; k < values.count; k += kColumns) {
    const Columns rows{k, values.count - k < kColumns ? values.count : k + kColumns};
    softmax.until(rows.end);
    for_query_tiles<2>(count, [&]<int kQueries>(int m) {
      // The first two passes prefetch, each for half of the rows.
      const auto before = [&](int64_t row) BATON_INLINE_LAMBDA {
        if (count <= 2) {
          values.template used<1>(row);
        } else if (m <= 2 && row % 2 == m / 2) {
          values.template used<2>(row - row % 2);
        }
      };
      weigh_columns<kQueries, 2 * kPackedVecs>(p + m, values, rows, to + m, before);
    });
  }
}

template <typename T>
void unpack_values(const Rows<T>& rows, Matrix values) {
  for (int64_t k = rows.first; k < rows.count; ++k) {
    const T* row = rows.data + k * rows.stride;
    int64_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) store(&values[k][d], load(row + d));
    if (d < rows.dim)
      store_partial(&values[k][d], load_partial(row + d, rows.dim - d), rows.dim - d);
  }
}

// The products of one tile of `count` query vectors with one block, in the way that suits count.
template <typename T>
struct BlockProducts : BlockScores<T> {
  // Whether weigh requests probabilities step by step as it goes through the block.
  static bool uses_block_in_place(int count) { return count <= kDirectQueries; }

  // Replaces vector i of a query vector's scores by probabilities.
  static BATON_INLINE void put_probabilities(float* scores, int i, Vec probabilities) {
    store(scores + i * kLanes, probabilities);
  }

  // scratch.out[m] += sum_k p[m][k] value[k]; p replaced the scores when softmax went through them.
  template <typename Softmax>
  static void weigh(int count, const Rows<T>& values, Softmax& softmax, AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      weigh_direct(count, values, softmax, scratch);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      weigh_packed(scratch.scores, count, values, values, scratch.out);
    } else {
      unpack_values(values, scratch.values);
      const Rows<float> unpacked{
          scratch.values.data, scratch.values.stride, values.first, values.count, values.dim, {}};
      weigh_packed(scratch.scores, count, unpacked, values, scratch.out);
    }
  }

  template <typename Softmax>
  static void weigh(int count, const ScatteredRows<T>& values, Softmax& softmax,
                    AttentionScratch& scratch) {
    weigh_direct(count, values, softmax, scratch);
  }

  // Writes a query vector's result: factor times its sums, in the order of head_dim.
  static void put_result(const float* sums, int64_t dim, float factor, T* out) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(sums + d) * set1(factor));
    if (d == dim) return;
    store_partial(out + d, load_partial(sums + d, dim - d) * set1(factor), dim - d);
  }
};

}  // namespace baton::cpu::BATON_ISA
