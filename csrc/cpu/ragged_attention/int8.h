// The products of attention over int8 keys and values for bfloat16 query vectors, on CPUs that
// multiply groups of four bytes into int32 sums (VNNI). Elements stay bytes. The sums of one block
// are exact, so neither the number of query vectors nor the order of additions matters.
//
// Scores: each element of a query vector is rounded to a multiple of the vector's unit, a power of
// two, in 23 bits; this is exact for bfloat16 elements down to 2^-14 of the largest one. Its three
// signed bytes are multiplied with the keys separately, with key + 128 as the unsigned operand.
//
// Values: the weights of a block, probabilities times the values' scales, are rounded to multiples
// of 1/65535 of the vector's largest weight in the block. Their two bytes are multiplied
// separately.
#pragma once

#include "cpu/ragged_attention/softmax.h"
#include "cpu/simd/transpose.h"

namespace baton::cpu::BATON_ISA {

// The rows of one block, wherever they lie: rows [first, count) of it, zeros outside.
struct Int8Rows {
  const Int8* row[kBlockKeys];
  int64_t first, count, dim;
  Ask<Int8> ask;

  // See Ask::used; k counts from the first row that exists.
  BATON_INLINE void used(int64_t k) const {
    if (dim == 128) return ask.template used<1, 128>(k, dim);
    if (dim == 64) return ask.template used<1, 64>(k, dim);
    ask.template used<1, 0>(k, dim);
  }
};
alignas(64) constexpr Int8 kZeroRow[kMaxHeadDim] = {};

// The products for query vectors of type T.
template <typename T>
struct Int8Products {
  static constexpr bool kExist = false;
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

namespace int8_attention {

constexpr int64_t kChunk = 64;  // elements in a vector of bytes
constexpr int kQueryParts = 3;
// The number of query vectors whose sums fit in registers: for scores, for values.
constexpr int kScoreTile = 2, kValueTile = 4;

template <bool kWhole>
BATON_INLINE __m512i load_bytes(const Int8* row, int64_t d, int64_t dim) {
  if constexpr (kWhole) return _mm512_loadu_si512(row + d);
  return _mm512_maskz_loadu_epi8((uint64_t{1} << (dim - d)) - 1, row + d);
}

// Calls fn.operator()<kWhole>(d) for every chunk of a row.
template <typename Fn>
BATON_INLINE void for_each_chunk(int64_t dim, const Fn& fn) {
  int64_t d = 0;
  for (; d + kChunk <= dim; d += kChunk) fn.template operator()<true>(d);
  if (d < dim) fn.template operator()<false>(d);
}

BATON_INLINE int32_t four_bytes(const uint8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, sizeof(bytes));
  return bytes;
}

// 1. Scores.

// Stored behind the parts of a query vector: the negative of what using key + 128 instead of key
// adds to the sums of each part, and the unit.
struct QueryTail {
  int32_t correction[kQueryParts];
  float unit;
};

// [group of four elements][part][element]. Fits the row, which has at least 16 x 4 bytes, and 4 per
// element.
inline void prepare_query(const BFloat16* query, int64_t dim, float* out) {
  const auto part = [&](int64_t d) BATON_INLINE_LAMBDA {
    return dim - d >= kLanes ? load(query + d) : load_partial(query + d, dim - d);
  };
  // Bits of magnitudes sort like the numbers, then infinity, then NaN.
  IntVec top{};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const IntVec magnitude = (IntVec)(as_bits(part(d)) & 0x7fffffffu);
    top = magnitude > top ? magnitude : top;
  }
  const int32_t exponent = _mm512_reduce_max_epi32((__m512i)top) >> 23;
  // The largest element becomes at least 2^21 and less than 2^22.
  int32_t factor_exponent = 127 + 127 + 21 - exponent;
  if (factor_exponent > 253) factor_exponent = 253;
  const UintVec factor = UintVec{} + (static_cast<uint32_t>(factor_exponent) << 23);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(out);
  QueryTail tail{};
  const bool is_finite = exponent < 255;
  __m512i sums[kQueryParts] = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Vec x = is_finite ? part(d) * as_float(factor) : zero();
    __m512i rest = _mm512_cvtps_epi32((__m512)x);
    for (int i = kQueryParts - 1; i >= 0; --i) {
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(rest, 24), 24);
      sums[i] = _mm512_add_epi32(sums[i], low);
      rest = _mm512_srai_epi32(_mm512_sub_epi32(rest, low), 8);
      alignas(16) uint8_t four[kLanes];
      _mm_store_si128(reinterpret_cast<__m128i*>(four), _mm512_cvtepi32_epi8(low));
      for (int64_t j = 0; j < kLanes && d + j < dim; j += 4) {
        __builtin_memcpy(bytes + (d + j) * kQueryParts + 4 * i, four + j, 4);
      }
    }
  }
  for (int i = 0; i < kQueryParts; ++i) {
    tail.correction[i] = -128 * _mm512_reduce_add_epi32(sums[i]);
  }
  tail.unit = is_finite
                  ? as_float(UintVec{} + (static_cast<uint32_t>(254 - factor_exponent) << 23))[0]
                  : __builtin_nanf("");
  __builtin_memcpy(bytes + dim * kQueryParts, &tail, sizeof(tail));
}

// Keys that are transposed together: each broadcast unit of a query vector then serves two sums.
constexpr int kGroups = 2, kGroupKeys = kGroups * kLanes;

// units[unit][key] + 128 for kGroupKeys keys of the block, beginning with key k.
BATON_INLINE void transpose_keys(const Int8Rows& keys, int64_t k, float (*units)[kGroupKeys]) {
  for_each_chunk(keys.dim, [&]<bool kWhole>(int64_t d) BATON_INLINE_LAMBDA {
    for (int group = 0; group < kGroupKeys; group += kLanes) {
      Vec x[kLanes];
      BATON_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        x[i] = (Vec)load_bytes<kWhole>(keys.row[k + group + i], d, keys.dim);
      }
      transpose(x);
      BATON_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const __m512i shifted = _mm512_xor_si512((__m512i)x[i], _mm512_set1_epi8(-128));
        _mm512_store_si512(units[d / 4 + i] + group, shifted);
      }
    }
  });
}

template <int kQueries>
BATON_INLINE void score_keys(Matrix query, const float (*units)[kGroupKeys], int64_t dim,
                             float (*scores)[kBlockKeys], int64_t k) {
  const uint8_t* parts[kQueries];
  QueryTail tails[kQueries];
  __m512i sums[kQueries][kQueryParts][kGroups];
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    parts[m] = reinterpret_cast<const uint8_t*>(query[m]);
    __builtin_memcpy(&tails[m], parts[m] + dim * kQueryParts, sizeof(QueryTail));
    BATON_UNROLL
    for (int i = 0; i < kQueryParts; ++i) {
      sums[m][i][0] = sums[m][i][1] = _mm512_set1_epi32(tails[m].correction[i]);
    }
  }
  for (int64_t unit = 0; unit < dim / 4; ++unit) {
    const __m512i x0 = _mm512_load_si512(units[unit]), x1 = _mm512_load_si512(units[unit] + kLanes);
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      BATON_UNROLL
      for (int i = 0; i < kQueryParts; ++i) {
        const __m512i q = _mm512_set1_epi32(four_bytes(parts[m] + (unit * kQueryParts + i) * 4));
        sums[m][i][0] = _mm512_dpbusd_epi32(sums[m][i][0], x0, q);
        sums[m][i][1] = _mm512_dpbusd_epi32(sums[m][i][1], x1, q);
      }
    }
  }
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    BATON_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const __m512i low =
          _mm512_add_epi32(_mm512_slli_epi32(sums[m][1][group], 8), sums[m][2][group]);
      const Vec sum = fmadd((Vec)_mm512_cvtepi32_ps(sums[m][0][group]), set1(65536.0f),
                            (Vec)_mm512_cvtepi32_ps(low));
      store(&scores[m][k + group * kLanes], sum * set1(tails[m].unit));
    }
  }
}

inline void score(int count, const Int8Rows& keys, AttentionScratch& scratch) {
  alignas(64) float units[kMaxHeadDim / 4][kGroupKeys];
  const int64_t num_keys = keys.count - keys.first;
  int64_t asked = 0;
  for (int64_t k = keys.first / kGroupKeys * kGroupKeys; k < keys.count; k += kGroupKeys) {
    transpose_keys(keys, k, units);
    // A few prefetches between products: the core drops those that it cannot queue.
    const int64_t end = k + kGroupKeys < keys.count ? k + kGroupKeys - keys.first : num_keys;
    const int64_t here = end - asked, begin = asked;
    for_query_tiles<kScoreTile>(count, [&]<int kQueries>(int m) {
      const int64_t share = begin + here * (m + kQueries) / count;
      for (; asked < share; ++asked) keys.used(asked);
      score_keys<kQueries>(scratch.query + m, units, keys.dim, scratch.scores + m, k);
    });
  }
}

// 2. Values.

// Tells BlockSoftmax how to store weights: as floats first, converted to bytes later.
struct Weights {
  static bool uses_block_in_place(int) { return false; }
  static BATON_INLINE void put_probabilities(float* scores, int i, Vec weights) {
    store(scores + i * kLanes, weights);
  }
};

// Converts the first num_vecs vectors of weights to bytes in the same place: 64 high bytes, then 64
// low ones. Returns the unit of which the weights are multiples.
BATON_INLINE float round_weights(float* scores, int64_t num_vecs) {
  Vec weights[kBlockVecs];
  Vec top = zero();
  IntVec is_nan{};
  for (int i = 0; i < kBlockVecs; ++i) {
    weights[i] = i < num_vecs ? load(scores + i * kLanes) : zero();
    top = max(weights[i], top);
    is_nan |= weights[i] != weights[i];
  }
  float most = reduce_max(top), lift = 1.0f;
  if (any(is_nan) || !(most < __builtin_inff())) {
    __builtin_memset(scores, 0, 2 * kBlockKeys);
    return __builtin_nanf("");
  }
  // A smaller divisor would make the quotient overflow.
  if (most < 0x1p-90f) lift = 0x1p60f;
  most *= lift;
  const Vec factor = set1(most > 0.0f ? 65535.0f / most * lift : 0.0f);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scores);
  for (int i = 0; i < kBlockVecs; ++i) {
    const __m512i rounded = _mm512_cvtps_epi32((__m512)(weights[i] * factor));
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + i * kLanes),
                    _mm512_cvtepi32_epi8(_mm512_srli_epi32(rounded, 8)));
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes + kBlockKeys + i * kLanes),
                    _mm512_cvtepi32_epi8(rounded));
  }
  return most / 65535.0f / lift;
}

// out[group of four rows][chunk]: four vectors of four bytes per column, one from each row. Vectors
// 0 and 1 hold columns 0-3, 16-19, .. and 4-7, 20-23, .. of the chunk; 2 and 3 hold columns 8-11,
// 24-27, .. and 12-15, 28-31, ..
inline void interleave_rows(const Int8Rows& values, char* out) {
  const int64_t stride = (values.dim + kChunk - 1) / kChunk * 4 * kChunk;
  for (int64_t k = values.first; k < values.count; k += 4) {
    for_each_chunk(values.dim, [&]<bool kWhole>(int64_t d) BATON_INLINE_LAMBDA {
      __m512i x[4];
      BATON_UNROLL
      for (int i = 0; i < 4; ++i) x[i] = load_bytes<kWhole>(values.row[k + i], d, values.dim);
      const __m512i low01 = _mm512_unpacklo_epi8(x[0], x[1]),
                    low23 = _mm512_unpacklo_epi8(x[2], x[3]),
                    high01 = _mm512_unpackhi_epi8(x[0], x[1]),
                    high23 = _mm512_unpackhi_epi8(x[2], x[3]);
      char* to = out + k / 4 * stride + 4 * d;
      _mm512_store_si512(to, _mm512_unpacklo_epi16(low01, low23));
      _mm512_store_si512(to + kChunk, _mm512_unpacklo_epi16(high01, high23));
      _mm512_store_si512(to + 2 * kChunk, _mm512_unpackhi_epi16(low01, low23));
      _mm512_store_si512(to + 3 * kChunk, _mm512_unpackhi_epi16(high01, high23));
    });
  }
}

// Adds kVecs of the four vectors of one chunk, beginning with `vec`, to the sums of kQueries query
// vectors.
template <int kQueries, int kVecs, typename Before>
BATON_INLINE void weigh_chunk(const float (*p)[kBlockKeys], const float* units,
                              const Int8Rows& values, const char* fours, int64_t chunk, int vec,
                              Matrix out, Before&& before) {
  const int64_t chunks = (values.dim + kChunk - 1) / kChunk, stride = chunks * 4 * kChunk;
  const char* from = fours + (chunk * 4 + vec) * kChunk;
  __m512i sums[kQueries][2][kVecs] = {};
  const int64_t end = (values.count + 3) / 4;
  for (int64_t four = values.first / 4; four < end; ++four) {
    before();
    __m512i x[kVecs];
    BATON_UNROLL
    for (int i = 0; i < kVecs; ++i) x[i] = _mm512_load_si512(from + four * stride + i * kChunk);
    BATON_UNROLL
    for (int m = 0; m < kQueries; ++m) {
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p[m]) + 4 * four;
      const __m512i high = _mm512_set1_epi32(four_bytes(bytes)),
                    low = _mm512_set1_epi32(four_bytes(bytes + kBlockKeys));
      BATON_UNROLL
      for (int i = 0; i < kVecs; ++i) {
        sums[m][0][i] = _mm512_dpbusd_epi32(sums[m][0][i], high, x[i]);
        sums[m][1][i] = _mm512_dpbusd_epi32(sums[m][1][i], low, x[i]);
      }
    }
  }
  // Into the order in which the bfloat16 products keep their sums (tile_bf16.h).
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  BATON_UNROLL
  for (int m = 0; m < kQueries; ++m) {
    BATON_UNROLL
    for (int i = 0; i < kVecs; i += 2) {
      const auto total = [&](int j) BATON_INLINE_LAMBDA {
        return _mm512_add_epi32(_mm512_slli_epi32(sums[m][0][j], 8), sums[m][1][j]);
      };
      const __m512i a = total(i), b = total(i + 1);
      const auto add = [&](__m512i sum, int64_t d) BATON_INLINE_LAMBDA {
        float* to = &out[m][d];
        store(to, fmadd((Vec)_mm512_cvtepi32_ps(sum), set1(units[m]), load(to)));
      };
      const int64_t d = chunk * kChunk + (vec + i) / 2 * kLanes;
      add(_mm512_permutex2var_epi64(a, first, b), d);
      if (chunk * kChunk + 32 < out.stride) add(_mm512_permutex2var_epi64(a, second, b), d + 32);
    }
  }
}

inline void weigh(int count, const Int8Rows& values, AttentionScratch& scratch) {
  char* fours = reinterpret_cast<char*>(scratch.values.data);
  interleave_rows(values, fours);
  float units[kMaxQueries];
  const int64_t num_vecs = (values.count + kLanes - 1) / kLanes;
  for (int m = 0; m < count; ++m) units[m] = round_weights(scratch.scores[m], num_vecs);
  const int64_t chunks = (values.dim + kChunk - 1) / kChunk;
  const int64_t num_rows = values.count - values.first;
  const int64_t fours_per_pass = (num_rows + 3) / 4;
  for_query_tiles<kValueTile>(count, [&]<int kQueries>(int m) {
    constexpr int kVecs = kQueries <= 2 ? 4 : 2;
    // Prefetches are spread over all products.
    int64_t asked = num_rows * m / count, owed = 0;
    const int64_t share = num_rows * (m + kQueries) / count - asked;
    const int64_t steps = chunks * 4 / kVecs * fours_per_pass;
    const auto before = [&]() BATON_INLINE_LAMBDA {
      for (owed += share; owed >= steps; owed -= steps) values.used(asked++);
    };
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      for (int vec = 0; vec < 4; vec += kVecs) {
        weigh_chunk<kQueries, kVecs>(scratch.scores + m, units + m, values, fours, chunk, vec,
                                     scratch.out + m, before);
      }
    }
  });
}

}  // namespace int8_attention

template <>
struct Int8Products<BFloat16> {
  static constexpr bool kExist = true;
  typedef int8_attention::Weights Weights;

  static void load_queries(const BFloat16* const* query, int count, int64_t dim,
                           AttentionScratch& scratch) {
    for (int m = 0; m < count; ++m) {
      int8_attention::prepare_query(query[m], dim, scratch.query[m]);
    }
  }

  // scratch.scores[m][k] = q[m] . key[k]
  static void score(int count, const Int8Rows& keys, AttentionScratch& scratch) {
    int8_attention::score(count, keys, scratch);
  }

  // scratch.out[m] += sum_k weight[m][k] value[k]. The weights replaced the scores when softmax
  // went through them. Hidden int8 elements are always finite, and their weight is 0.
  static void weigh(int count, const Int8Rows& values, AttentionScratch& scratch) {
    int8_attention::weigh(count, values, scratch);
  }
};

#endif  // __AVX512BF16__ && __AVX512VNNI__

}  // namespace baton::cpu::BATON_ISA
