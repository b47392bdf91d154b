// The scores of one block: query vectors times keys, with one order of additions for any number of
// query vectors and in both ways of reading the block.
//
// A row of keys consists of units that fill a 32-bit lane: floats, or pairs of bfloat16 on CPUs
// that multiply pairs. From the row's first element on, every four units form a part. The parts are
// assigned to the parts of a vector register in turn, and each part of the register adds up its
// units in order, in one chain of additions. A chain ends after kChain units at the latest, because
// longer chains round more. The sums of the chains are then added to the score one by one.
//
// Decode leaves keys where they lie and transposes four of them at a time within the parts, so that
// a lane holds one part of one key. Prefill transposes the whole block, so that a lane is one key.
#pragma once

#include "cpu/ragged_attention/tile.h"
#include "cpu/simd/bf16_pairs.h"
#include "cpu/simd/dot.h"
#include "cpu/simd/transpose.h"

namespace baton::cpu::BATON_ISA {

constexpr int64_t kChain = 64;
constexpr int64_t kStretch = kChain * kParts;  // units whose chains run at the same time

// The number of units in a row.
template <typename T>
constexpr int64_t num_units(int64_t dim) {
  return dim * kLanes / Dot<T>::kStep;
}

// Loads a register of units, beginning with element `d` of a row; units behind its end are 0.
template <typename T>
BATON_INLINE Vec load_units(const T* row, int64_t d, int64_t dim) {
  typedef Dot<T> D;
  return dim - d >= D::kStep ? (Vec)D::operand(row + d) : (Vec)D::operand_partial(row + d, dim - d);
}

// Broadcasts one unit to every lane.
template <typename T>
BATON_INLINE typename Dot<T>::Operand repeat_unit(const float* unit) {
#if defined(__AVX512BF16__)
  if constexpr (Dot<T>::kStep != kLanes) return broadcast_pair(unit);
#endif
  if constexpr (Dot<T>::kStep == kLanes) return set1(*unit);
}

// 1. Few query vectors.

// The number of floats in one prepared query vector.
template <typename T>
constexpr int64_t direct_query_size(int64_t dim) {
  return (dim + Dot<T>::kStep - 1) / Dot<T>::kStep * 4 * kLanes;
}
static_assert(kDirectQueries * 4 <= kMaxQueries, "prepared query vectors fit the scratch");

// out[query vector][register of units][j]: unit j of every part, in the four lanes of the part.
template <typename T>
void prepare_direct(const T* const* query, int count, int64_t dim, float* out) {
  for (int m = 0; m < count; ++m) {
    for (int64_t d = 0; d < dim; d += Dot<T>::kStep, out += 4 * kLanes) {
      const Vec units = load_units<T>(query[m], d, dim);
      store(out, repeat_in_parts<0>(units));
      store(out + kLanes, repeat_in_parts<1>(units));
      store(out + 2 * kLanes, repeat_in_parts<2>(units));
      store(out + 3 * kLanes, repeat_in_parts<3>(units));
    }
  }
}

// total + part 0 + part 1 ..., for four keys in parallel.
BATON_INLINE Quad add_parts(Quad total, Vec sums) {
  total += part<0>(sums);
  if constexpr (kParts > 1) total += part<1>(sums);
  if constexpr (kParts > 2) total = total + part<2>(sums) + part<3>(sums);
  return total;
}

// scores[m][k .. k + 4) for kQueries prepared query vectors. Without kWhole the block ends before
// the fourth key, and rows behind its end are not read.
template <int kDim, int kQueries, bool kWhole, typename BlockRows>
BATON_INLINE void score_four(const float* query, const BlockRows& keys, int64_t k,
                             float (*scores)[kBlockKeys]) {
  typedef typename BlockRows::Element T;
  typedef Dot<T> D;
  static_assert(kDim % D::kStep == 0);
  const int64_t dim = kDim != 0 ? kDim : keys.dim, size = direct_query_size<T>(dim);
  const T* rows[4];
  BATON_UNROLL
  for (int i = 0; i < 4; ++i) rows[i] = kWhole || k + i < keys.count ? keys.row(k + i) : nullptr;
  constexpr int64_t kStretchElements = kStretch * D::kStep / kLanes;
  Quad total[kQueries] = {};
  Vec sums[kQueries] = {};
  const auto load_key = [&](const T* key, int64_t d) BATON_INLINE_LAMBDA {
    if constexpr (kDim != 0) return (Vec)D::operand(key + d);
    return load_units(key, d, dim);
  };
  const auto step = [&](int64_t d) BATON_INLINE_LAMBDA {
    Vec x[4];
    BATON_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = kWhole || k + i < keys.count ? load_key(rows[i], d) : zero();
    }
    transpose_parts(x[0], x[1], x[2], x[3]);
    const float* prepared = query + d / D::kStep * 4 * kLanes;
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Vec q = load(prepared + m * size + j * kLanes);
        sums[m] = D::step((typename D::Operand)q, (typename D::Operand)x[j], sums[m]);
      }
    }
    const int64_t next = d + D::kStep;
    if (next < dim && next % kStretchElements != 0) return;
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      total[m] = add_parts(total[m], sums[m]);
      sums[m] = zero();
    }
  };
  if constexpr (kDim != 0) {
    BATON_UNROLL
    for (int64_t d = 0; d < kDim; d += D::kStep) step(d);
  } else {
    for (int64_t d = 0; d < dim; d += D::kStep) step(d);
  }
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) __builtin_memcpy(&scores[m][k], &total[m], sizeof(Quad));
}

template <int kDim, typename BlockRows>
void score_direct_block(const float* query, int count, const BlockRows& keys,
                        float (*scores)[kBlockKeys]) {
  typedef typename BlockRows::Element T;
  const int64_t size = direct_query_size<T>(kDim != 0 ? kDim : keys.dim);
  for_query_tiles<kDirectTile>(count, [&]<int kQueries>(int m) {
    const float* first = query + m * size;
    int64_t k = keys.first;
    for (; k + 4 <= keys.count; k += 4) {
      if (m == 0) keys.template used<4, kDim>(k);
      score_four<kDim, kQueries, true>(first, keys, k, scores + m);
    }
    if (k == keys.count) return;
    if (m == 0) keys.template used<4, kDim>(k);
    score_four<kDim, kQueries, false>(first, keys, k, scores + m);
  });
}

// scores[m][k] for `count` prepared query vectors and the block's keys.
template <typename BlockRows>
void score_direct(const float* query, int count, const BlockRows& keys,
                  float (*scores)[kBlockKeys]) {
  if (keys.dim == 64) return score_direct_block<64>(query, count, keys, scores);
  if (keys.dim == 128) return score_direct_block<128>(query, count, keys, scores);
  score_direct_block<0>(query, count, keys, scores);
}

// 2. Many query vectors.

// query[m][unit]
template <typename T>
void prepare_packed(const T* const* query, int count, int64_t dim, Matrix out) {
  for (int m = 0; m < count; ++m) {
    for (int64_t d = 0, unit = 0; d < dim; d += Dot<T>::kStep, unit += kLanes) {
      store(&out[m][unit], load_units<T>(query[m], d, dim));
    }
  }
}

// keys[unit][k]; keys outside the block become 0, so that no stale float enters a product.
template <typename T>
void unpack_keys(const Rows<T>& rows, float (*keys)[kBlockKeys]) {
  const int64_t units = num_units<T>(rows.dim);
  for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
    for (int64_t d = 0, unit = 0; d < rows.dim; d += Dot<T>::kStep, unit += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool is_row = k + i >= rows.first && k + i < rows.count;
        block[i] = is_row ? load_units<T>(rows.data + (k + i) * rows.stride, d, rows.dim) : zero();
      }
      transpose(block);
      const int64_t here = units - unit < kLanes ? units - unit : kLanes;
      for (int64_t i = 0; i < here; ++i) store(&keys[unit + i][k], block[i]);
    }
  }
}

// scores[m][k] = query[m] . keys[.][k]; before(unit) is called before every fourth unit.
template <typename T, int kQueries, typename Before>
void score_packed(Matrix query, const float (*keys)[kBlockKeys], int64_t units,
                  float (*scores)[kBlockKeys], Before&& before) {
  typedef Dot<T> D;
  typedef typename D::Operand Operand;
  for (int k = 0; k < kBlockKeys; k += kPackedVecs * kLanes) {
    for (int64_t stretch = 0; stretch < units; stretch += kStretch) {
      const int64_t end = units - stretch < kStretch ? units : stretch + kStretch;
      for (int64_t chain = stretch; chain < stretch + kLanes && chain < end; chain += 4) {
        Vec sums[kQueries][kPackedVecs] = {};
        for (int64_t unit = chain; unit < end; unit += kLanes) {
          before(unit);
          BATON_UNROLL
          for (int j = 0; j < 4; ++j) {
            Operand x[kPackedVecs];
            BATON_UNROLL
            for (int i = 0; i < kPackedVecs; ++i) {
              x[i] = (Operand)load(&keys[unit + j][k + i * kLanes]);
            }
            BATON_UNROLL
            for (int m = 0; m < kQueries; ++m) {
              const Operand q = repeat_unit<T>(&query[m][unit + j]);
              BATON_UNROLL
              for (int i = 0; i < kPackedVecs; ++i) sums[m][i] = D::step(q, x[i], sums[m][i]);
            }
          }
        }
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          BATON_UNROLL
          for (int i = 0; i < kPackedVecs; ++i) {
            float* score = &scores[m][k + i * kLanes];
            store(score, chain == 0 ? sums[m][i] : load(score) + sums[m][i]);
          }
        }
      }
    }
  }
}

// The scores of one tile of `count` query vectors, computed in the way that suits count.
template <typename T>
struct BlockScores {
  // Converts the tile's query vectors into the form that score() takes.
  static void load_queries(const T* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      prepare_direct(query, count, dim, scratch.query.data);
    } else {
      prepare_packed(query, count, dim, scratch.query);
    }
  }

  // Whether score() accepts scattered rows if there are few query vectors.
  static constexpr bool kHasScatteredRows = true;

  static void score(int count, const ScatteredRows<T>& keys, AttentionScratch& scratch) {
    score_direct(scratch.query.data, count, keys, scratch.scores);
  }

  // scratch.scores[m][k] = q[m] . key[k]. Scattered rows are only for few query vectors.
  static void score(int count, const Rows<T>& keys, AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      score_direct(scratch.query.data, count, keys, scratch.scores);
      return;
    }
    unpack_keys(keys, scratch.keys);
    for_query_tiles<kPackedTile>(count, [&]<int kQueries>(int m) {
      score_packed<T, kQueries>(scratch.query + m, scratch.keys, num_units<T>(keys.dim),
                                scratch.scores + m, keys.share(m, kQueries, count));
    });
  }
};

}  // namespace baton::cpu::BATON_ISA
