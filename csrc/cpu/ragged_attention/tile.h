// The data that the two products of attention over one block of keys work on: scores = q k^T
// (scores.h) and out += p v (values.h).
//
// With few query vectors (decode) keys and values are used straight from the cache, each loaded
// once for all query vectors. With many (prefill) the block is first unpacked, at a cost that the
// whole tile shares. Every sum has the same order either way: a token has the same bits whether it
// is decoded, prefilled whole or prefilled in chunks of any size.
#pragma once

#include "common/ragged_attention.h"
#include "cpu/ragged_attention/ahead.h"

namespace baton::cpu::BATON_ISA {

constexpr int kBlockVecs = kBlockKeys / kLanes;
constexpr int kMaxQueries = static_cast<int>(kAttentionTileQueries);
constexpr int kMaxHeadDim = 256;
// Up to this many query vectors share one pass over keys and values where they lie.
constexpr int kDirectQueries = 8;

#if defined(__AVX512F__)
// 24 accumulators leave room for four vectors of keys or values and one broadcast.
constexpr int kPackedTile = 6, kPackedVecs = 4, kDirectTile = 4;
#else
// 8 accumulators of 16 registers.
constexpr int kPackedTile = 4, kPackedVecs = 2, kDirectTile = 4;
#endif

// Rows of floats in scratch, only as long as head_dim needs: rows of kMaxHeadDim floats would map
// to a few sets of the first-level cache.
struct Matrix {
  float* data;
  int64_t stride;

  BATON_INLINE float* operator[](int64_t row) const { return data + row * stride; }
  BATON_INLINE Matrix operator+(int64_t row) const { return {data + row * stride, stride}; }
};

// The working memory of one thread while it processes tiles.
struct AttentionScratch {
  explicit AttentionScratch(int64_t head_dim)
      : out{out_rows, attention_sums(head_dim)},
        merged{merged_rows, out.stride},
        block{block_rows, out.stride},
        query{query_rows, out.stride},
        values{value_rows, out.stride},
        copy{copied_rows},
        places{row_places} {}
  AttentionScratch(const AttentionScratch&) = delete;

  alignas(64) float scores[kMaxQueries][kBlockKeys];
  alignas(64) float keys[kMaxHeadDim][kBlockKeys];  // prefill only, transposed
  alignas(64) float sum[kMaxQueries][kLanes];       // per lane until the segment ends
  // The scales of an eight-bit block; 0 where the block has no key.
  alignas(64) float key_scales[kBlockKeys], value_scales[kBlockKeys];
  float maximum[kMaxQueries];
  const Matrix out, merged;  // sums of this segment, and of the segments before
  const Matrix block;        // sums of a block so far; decode only
  const Matrix query;        // in the form that the scores need
  const Matrix values;       // prefill only
  // For a block of keys or values whose rows are not one run: a copy of the rows, or the places
  // where they lie. For an eight-bit block: its elements in query's type.
  char* const copy;
  const void** const places;
  int tile_vectors = 0;  // the number of query vectors that AMX tiles are configured for

 private:
  alignas(64) float out_rows[kMaxQueries * kMaxHeadDim];
  alignas(64) float merged_rows[kMaxQueries * kMaxHeadDim];
  alignas(64) float block_rows[kDirectQueries * kMaxHeadDim];
  alignas(64) float query_rows[kMaxQueries * kMaxHeadDim];
  alignas(64) float value_rows[kBlockKeys * kMaxHeadDim];
  alignas(64) char copied_rows[kBlockKeys * kMaxHeadDim * sizeof(float)];
  const void* row_places[kBlockKeys];
};

// The keys or values of one block, where they lie in the cache: rows [first, count) of the block.
template <typename T>
struct Rows {
  typedef T Element;
  static constexpr bool kScattered = false;

  const T* data;   // row 0 of the block
  int64_t stride;  // elements from one row to the next
  int64_t first;   // a multiple of kFirstKeys: a window hides the rows before it
  int64_t count;   // at most kBlockKeys
  int64_t dim;
  Ask<T> ask;

  BATON_INLINE const T* row(int64_t k) const { return data + k * stride; }

  // See Ask::used.
  template <int kRows, int kDim = 0>
  BATON_INLINE void used(int64_t k) const {
    k -= first;
    if constexpr (kDim != 0) return ask.template used<kRows, kDim>(k, dim);
    // The usual head sizes without a loop.
    if (dim == 128) return ask.template used<kRows, 128>(k, dim);
    if (dim == 64) return ask.template used<kRows, 64>(k, dim);
    ask.template used<kRows, 0>(k, dim);
  }

  // The prefetches that query vectors [m, m + n) of `all` issue.
  BATON_INLINE auto share(int m, int n, int all) const;
};

// The same with each row anywhere: few query vectors read pages smaller than a block this way.
template <typename T>
struct ScatteredRows : Rows<T> {
  static constexpr bool kScattered = true;

  const T* const* rows;  // as long as the block

  BATON_INLINE const T* row(int64_t k) const { return rows[k]; }
};

// A share of a block's prefetches: one row every fourth step, because the core drops bursts.
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
  const int64_t rows = count - first;
  return Share<T>{*this, first + rows * m / all, first + rows * (m + n) / all};
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

}  // namespace baton::cpu::BATON_ISA
