// The two products of attention over one block of keys: scores = q k^T and out += p v.
//
// With few query vectors (decode) keys and values are used straight from the cache, each loaded
// once for all query vectors. With many (prefill) the block is first unpacked: keys transposed, so
// that lanes are keys and no sum has to be folded; unpacking is paid once for the whole tile.
//
// BlockProducts<T> is the definition for every type; tile_bf16.h replaces it where the
// CPU multiplies bfloat16 itself.
#pragma once

#include "common/ragged_attention.h"
#include "cpu/ragged_attention/ahead.h"
#include "cpu/simd/dot.h"

namespace baton::cpu::BATON_ISA {

constexpr int kBlockVecs = kBlockKeys / kLanes;
constexpr int kMaxQueries = static_cast<int>(kAttentionTileQueries);
constexpr int kMaxHeadDim = 256;
// Up to here query vectors share one pass over keys and values where they lie.
constexpr int kDirectQueries = 8;

#if defined(__AVX512F__)
// 24 accumulators leave room for four vectors of keys or values and one broadcast.
constexpr int kPackedTile = 6, kPackedVecs = 4, kDirectTile = 4;
#else
// 8 accumulators of 16 registers.
constexpr int kPackedTile = 4, kPackedVecs = 2, kDirectTile = 4;
#endif

// What one thread needs while it works on a tile.
struct AttentionScratch {
  alignas(64) float scores[kMaxQueries][kBlockKeys];
  alignas(64) float out[kMaxQueries][kMaxHeadDim];
  alignas(64) float query[kMaxQueries][kMaxHeadDim];  // prefill only
  alignas(64) float keys[kMaxHeadDim][kBlockKeys];    // prefill only, transposed
  alignas(64) float values[kBlockKeys][kMaxHeadDim];  // prefill only
  float maximum[kMaxQueries];
  alignas(64) float sum[kMaxQueries][kLanes];  // in lanes until the last block
};

// The keys or values of one block where they lie in the cache.
template <typename T>
struct Rows {
  const T* data;
  int64_t stride;  // elements from one column to the next
  int64_t count;   // columns of this block, at most kBlockKeys
  int64_t dim;
  Ask<T> ask;

  // See Ask::used.
  template <int kRows, int kDim = 0>
  BATON_INLINE void used(int64_t k) const {
    if constexpr (kDim != 0) return ask.template used<kRows, kDim>(k, dim);
    // The usual ones without a loop.
    if (dim == 128) return ask.template used<kRows, 128>(k, dim);
    if (dim == 64) return ask.template used<kRows, 64>(k, dim);
    ask.template used<kRows, 0>(k, dim);
  }

  // What query vectors [m, m + n) of `all` ask for.
  BATON_INLINE auto share(int m, int n, int all) const;
};

// A share of a block's requests: one row with every fourth step, because bursts are dropped.
template <typename T>
struct Share {
  const Rows<T>& rows;
  int64_t next, end;

  BATON_INLINE void operator()(int64_t step) {
    if (step % 4 == 0 && next < end) rows.template used<1>(next++);
  }
};

template <typename T>
BATON_INLINE auto Rows<T>::share(int m, int n, int all) const {
  return Share<T>{*this, count * m / all, count * (m + n) / all};
}

// Calls fn.operator()<m>(first) for tiles of at most kTile of `count` query vectors.
template <int kTile, typename Fn>
BATON_INLINE void for_query_tiles(int count, Fn&& fn) {
  int first = 0;
  for (; first + kTile <= count; first += kTile) fn.template operator()<kTile>(first);
  if (first == count) return;
  const auto rest = [&]<int kRest>() { fn.template operator()<kRest>(first); };
  if constexpr (kTile == 6) {
    dispatch_int<1, 2, 3, 4, 5>(count - first, rest);
  } else if constexpr (kTile == 4) {
    dispatch_int<1, 2, 3>(count - first, rest);
  } else {
    static_assert(kTile == 2);
    rest.template operator()<1>();
  }
}

// scores[m][first ..] = q[m] . key for kQueries query vectors and kKeys keys.
template <typename T, int kQueries, int kKeys>
BATON_INLINE void score_direct(const T* const* query, const T* key, int64_t stride, int64_t dim,
                               float (*scores)[kBlockKeys], int64_t first) {
  typedef Dot<T> D;
  Vec sums[kQueries][kKeys] = {};
  int64_t d = 0;
  for (; d + D::kStep <= dim; d += D::kStep) {
    typename D::Operand k[kKeys];
    BATON_UNROLL
    for (int i = 0; i < kKeys; ++i) k[i] = D::operand(key + i * stride + d);
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const typename D::Operand q = D::operand(query[m] + d);
      BATON_UNROLL
      for (int i = 0; i < kKeys; ++i) sums[m][i] = D::step(q, k[i], sums[m][i]);
    }
  }
  if (const int64_t rest = dim - d; rest > 0) {
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const typename D::Operand q = D::operand_partial(query[m] + d, rest);
      BATON_UNROLL
      for (int i = 0; i < kKeys; ++i) {
        sums[m][i] = D::step(q, D::operand_partial(key + i * stride + d, rest), sums[m][i]);
      }
    }
  }
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    if constexpr (kKeys == 4) {
      const Quad sum = reduce_add4(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
      __builtin_memcpy(&scores[m][first], &sum, sizeof(sum));
    } else {
      for (int i = 0; i < kKeys; ++i) scores[m][first + i] = reduce_add(sums[m][i]);
    }
  }
}

template <typename T>
void score_direct_block(const T* const* query, int count, const Rows<T>& keys,
                        float (*scores)[kBlockKeys]) {
  for_query_tiles<kDirectTile>(count, [&]<int kQueries>(int m) {
    int64_t i = 0;
    for (; i + 4 <= keys.count; i += 4) {
      if (m == 0) keys.template used<4>(i);
      const T* key = keys.data + i * keys.stride;
      score_direct<T, kQueries, 4>(query + m, key, keys.stride, keys.dim, scores + m, i);
    }
    for (; i < keys.count; ++i) {
      if (m == 0) keys.template used<1>(i);
      const T* key = keys.data + i * keys.stride;
      score_direct<T, kQueries, 1>(query + m, key, keys.stride, keys.dim, scores + m, i);
    }
  });
}

// Columns of a block.
struct Columns {
  int64_t begin, end;
};

// out[m][d ..] += sum_k p[m][k] value[k][d ..] over these columns, for kQueries query vectors and
// kVecs vectors of d; before(k) comes before column k.
template <typename T, int kQueries, int kVecs, typename Before>
BATON_INLINE void weigh(const float (*p)[kBlockKeys], const Rows<T>& values, Columns columns,
                        float (*out)[kMaxHeadDim], int64_t d, Before&& before) {
  // A block's sum starts from zero: added one by one to a long row's total, small terms would
  // drown.
  Vec sums[kQueries][kVecs] = {};
  const T* value = values.data + columns.begin * values.stride + d;
  for (int64_t k = columns.begin; k < columns.end; ++k, value += values.stride) {
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
  }
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    BATON_UNROLL
    for (int i = 0; i < kVecs; ++i) {
      float* total = &out[m][d + i * kLanes];
      store(total, load(total) + sums[m][i]);
    }
  }
}

// The same for the last elements of head_dim, fewer than a vector.
template <typename T, int kQueries>
BATON_INLINE void weigh_rest(const float (*p)[kBlockKeys], const Rows<T>& values, Columns columns,
                             float (*out)[kMaxHeadDim], int64_t d) {
  for (int m = 0; m < kQueries; ++m) {
    Vec sum = zero();
    for (int64_t k = columns.begin; k < columns.end; ++k) {
      sum = fmadd(set1(p[m][k]), load_partial(values.data + k * values.stride + d, values.dim - d),
                  sum);
    }
    store(&out[m][d], load(&out[m][d]) + sum);
  }
}

// All of head_dim, kVecs vectors of it at a time.
template <typename T, int kQueries, int kVecs, typename Before>
BATON_INLINE void weigh_columns(const float (*p)[kBlockKeys], const Rows<T>& values,
                                Columns columns, float (*out)[kMaxHeadDim], Before&& before) {
  int64_t d = 0;
  for (; d + kVecs * kLanes <= values.dim; d += kVecs * kLanes) {
    weigh<T, kQueries, kVecs>(p, values, columns, out, d, before);
  }
  for (; d + kLanes <= values.dim; d += kLanes) {
    weigh<T, kQueries, 1>(p, values, columns, out, d, before);
  }
  if (d < values.dim) weigh_rest<T, kQueries>(p, values, columns, out, d);
}

// Many query vectors: each pass over the block's rows serves as many sums as there are registers.
// `stored`: what the rows have been unpacked from.
template <typename T, typename Stored>
void weigh_packed(const float (*p)[kBlockKeys], int count, const Rows<T>& values,
                  const Rows<Stored>& stored, float (*out)[kMaxHeadDim]) {
  for_query_tiles<kPackedTile>(count, [&]<int kQueries>(int m) {
    weigh_columns<T, kQueries, kPackedVecs>(p + m, values, {0, values.count}, out + m,
                                            stored.share(m, kQueries, count));
  });
}

// Few query vectors. Where all sums find registers the block is streamed; else sixteen rows at a
// time, which stay in the first-level cache while two query vectors after another pass over them.
// Two, because the sums of whole rows then find registers: rows come in the order of addresses.
template <typename T, typename Softmax>
void weigh_direct(const float (*p)[kBlockKeys], int count, const Rows<T>& values, Softmax& softmax,
                  float (*out)[kMaxHeadDim]) {
  if (values.dim == kPackedVecs * kLanes && count <= kDirectTile) {
    const auto before = [&](int64_t k) BATON_INLINE_LAMBDA {
      softmax.until(k + 1);
      values.template used<1>(k);
    };
    dispatch_int<1, 2, 3, 4>(count, [&]<int kQueries>() {
      weigh<T, kQueries, kPackedVecs>(p, values, {0, values.count}, out, 0, before);
    });
    return;
  }
  constexpr int64_t kColumns = 16;
  for (int64_t k = 0; k < values.count; k += kColumns) {
    const Columns columns{k, values.count - k < kColumns ? values.count : k + kColumns};
    softmax.until(columns.end);
    for_query_tiles<2>(count, [&]<int kQueries>(int m) {
      // The first two passes ask, each for half of the rows.
      const auto before = [&](int64_t row) BATON_INLINE_LAMBDA {
        if (count <= 2) {
          values.template used<1>(row);
        } else if (m <= 2 && row % 2 == m / 2) {
          values.template used<2>(row - row % 2);
        }
      };
      weigh_columns<T, kQueries, 2 * kPackedVecs>(p + m, values, columns, out + m, before);
    });
  }
}

// keys[d][k] = key[k][d]; columns past count are 0, so that no stale float enters a product.
template <typename T>
void unpack_keys(const Rows<T>& rows, float (*keys)[kBlockKeys]) {
  for (int64_t k = 0; k < kBlockKeys; k += kLanes) {
    const int64_t here = rows.count - k < kLanes ? rows.count - k : kLanes;
    for (int64_t d = 0; d < rows.dim; d += kLanes) {
      const int64_t width = rows.dim - d < kLanes ? rows.dim - d : kLanes;
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* row = rows.data + (k + i) * rows.stride + d;
        block[i] = i >= here ? zero() : width == kLanes ? load(row) : load_partial(row, width);
      }
      transpose(block);
      for (int64_t i = 0; i < width; ++i) store(&keys[d + i][k], block[i]);
    }
  }
}

template <typename T>
void unpack_values(const Rows<T>& rows, float (*values)[kMaxHeadDim]) {
  for (int64_t k = 0; k < rows.count; ++k) {
    const T* row = rows.data + k * rows.stride;
    int64_t d = 0;
    for (; d + kLanes <= rows.dim; d += kLanes) store(&values[k][d], load(row + d));
    if (d < rows.dim)
      store_partial(&values[k][d], load_partial(row + d, rows.dim - d), rows.dim - d);
  }
}

// scores[m][k] = query[m] . keys[.][k], lanes are keys; in stretches of kStretch elements, because
// one long chain of additions would round more than a sum in lanes does.
template <int kQueries, typename Before>
void score_packed(const float (*query)[kMaxHeadDim], const float (*keys)[kBlockKeys], int64_t dim,
                  float (*scores)[kBlockKeys], Before&& before) {
  constexpr int64_t kStretch = 64;
  for (int k = 0; k < kBlockKeys; k += kPackedVecs * kLanes) {
    for (int64_t first = 0; first < dim; first += kStretch) {
      const int64_t last = first + kStretch < dim ? first + kStretch : dim;
      Vec sums[kQueries][kPackedVecs] = {};
      for (int64_t d = first; d < last; ++d) {
        before(d);
        Vec v[kPackedVecs];
        BATON_UNROLL
        for (int i = 0; i < kPackedVecs; ++i) v[i] = load(&keys[d][k + i * kLanes]);
        BATON_UNROLL
        for (int m = 0; m < kQueries; ++m) {
          const Vec q = set1(query[m][d]);
          BATON_UNROLL
          for (int i = 0; i < kPackedVecs; ++i) sums[m][i] = fmadd(q, v[i], sums[m][i]);
        }
      }
      BATON_UNROLL
      for (int m = 0; m < kQueries; ++m) {
        BATON_UNROLL
        for (int i = 0; i < kPackedVecs; ++i) {
          float* score = &scores[m][k + i * kLanes];
          store(score, first == 0 ? sums[m][i] : load(score) + sums[m][i]);
        }
      }
    }
  }
}

// The products of one tile of `count` query vectors with one block, in the way that suits count.
template <typename T>
struct BlockProducts {
  // Prepares the tile's query vectors.
  static void load_queries(const T* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    if (count <= kDirectQueries) return;
    for (int m = 0; m < count; ++m) {
      for (int64_t d = 0; d < dim; ++d) scratch.query[m][d] = to_float(query[m][d]);
    }
  }

  // scratch.scores[m][k] = q[m] . key[k].
  static void score(const T* const* query, int count, const Rows<T>& keys,
                    AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      score_direct_block(query, count, keys, scratch.scores);
      return;
    }
    unpack_keys(keys, scratch.keys);
    for_query_tiles<kPackedTile>(count, [&]<int kQueries>(int m) {
      score_packed<kQueries>(scratch.query + m, scratch.keys, keys.dim, scratch.scores + m,
                             keys.share(m, kQueries, count));
    });
  }

  // Whether weigh asks for probabilities as it goes through the block.
  static bool uses_block_in_place(int count) { return count <= kDirectQueries; }

  // Vector i of a query vector's scores is replaced by these.
  static BATON_INLINE void put_probabilities(float* scores, int i, Vec probabilities) {
    store(scores + i * kLanes, probabilities);
  }

  // scratch.out[m] += sum_k p[m][k] value[k]; p: the scores, once softmax has been through them.
  template <typename Softmax>
  static void weigh(int count, const Rows<T>& values, Softmax& softmax, AttentionScratch& scratch) {
    if (count <= kDirectQueries) {
      weigh_direct<T>(scratch.scores, count, values, softmax, scratch.out);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      weigh_packed(scratch.scores, count, values, values, scratch.out);
    } else {
      unpack_values(values, scratch.values);
      const Rows<float> unpacked{&scratch.values[0][0], kMaxHeadDim, values.count, values.dim, {}};
      weigh_packed(scratch.scores, count, unpacked, values, scratch.out);
    }
  }

  // A query vector's result: factor times its sums, in the order of head_dim.
  static void put_result(const float* sums, int64_t dim, float factor, T* out) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(out + d, load(sums + d) * set1(factor));
    if (d == dim) return;
    store_partial(out + d, load_partial(sums + d, dim - d) * set1(factor), dim - d);
  }
};

}  // namespace baton::cpu::BATON_ISA
