// The rows of one block of keys or values in the form that the products take: copied where they
// are not one run, as a list of places where few query vectors use them, and with eight-bit
// elements converted to query's type.
#pragma once

#include "cpu/ragged_attention/tile.h"
#include "cpu/simd/eight_bit.h"

namespace baton::cpu::BATON_ISA {

// A copy of rows [first, end) of the block of keys or values that begins at key `block`.
template <typename T>
__attribute__((noinline)) Rows<T> copied_rows(const Stream<T>& from, int64_t block, int64_t first,
                                              int64_t end, int64_t dim, const Ask<T>& ask,
                                              AttentionScratch& scratch) {
  T* copy = reinterpret_cast<T*>(scratch.copy);
  const int64_t bytes = dim * sizeof(T);
  char* next = scratch.copy + first * bytes;
  from.for_each_page(block + first, end - first, [&](const T* rows, int64_t count) {
    copy_rows(next, bytes, reinterpret_cast<const char*>(rows), from.stride() * sizeof(T), count,
              bytes);
    next += count * bytes;
  });
  return {copy, dim, first, end, dim, ask};
}

// Converts rows of eight-bit elements, S, to rows of T.
template <typename S, typename T>
BATON_INLINE void widen_rows(const Stream<Int8>& from, int64_t block, int64_t first, int64_t end,
                             int64_t dim, const Ask<Int8>& ask, const float* scales, T* out) {
  int64_t k = first;
  from.for_each_run(block + first, end - first, [&](const Int8* rows, int64_t count) {
    for (; count > 0; --count, ++k, rows += from.stride()) {
      ask.template used<1, 0>(k - first, dim);
      const S* row = reinterpret_cast<const S*>(rows);
      if constexpr (sizeof(T) == sizeof(float)) {
        dequantize(row, scales[k], dim, out + k * dim);
      } else {
        widen(row, dim, out + k * dim);
      }
    }
  });
}

template <typename T>
__attribute__((noinline)) Rows<T> widened_rows(Dtype dtype, const Stream<Int8>& from, int64_t block,
                                               int64_t first, int64_t end, int64_t dim,
                                               const Ask<Int8>& ask, const float* scales,
                                               AttentionScratch& scratch) {
  T* out = reinterpret_cast<T*>(scratch.copy);
  dispatch_eight_bit(
      dtype, [&]<typename S>() { widen_rows<S>(from, block, first, end, dim, ask, scales, out); });
  return {out, dim, first, end, dim, {}};
}

// Loads the scales of keys or values [first, end) of the block.
static void load_scales(const Stream<float>& from, int64_t block, int64_t first, int64_t end,
                        float (&scales)[kBlockKeys]) {
  for (int64_t k = 0; k < kBlockKeys; k += kLanes) store(scales + k, zero());
  float* next = scales + first;
  from.for_each_run(block + first, end - first, [&](const float* run, int64_t count) {
    if (from.stride() == 1) {
      __builtin_memcpy(next, run, count * sizeof(float));
      next += count;
      return;
    }
    for (; count > 0; --count, run += from.stride()) *next++ = *run;
  });
}

// A list of the places where these rows lie.
template <typename T>
BATON_INLINE ScatteredRows<T> scattered_rows(const Stream<T>& from, int64_t block, int64_t first,
                                             int64_t end, int64_t dim, const Ask<T>& ask,
                                             AttentionScratch& scratch) {
  const T** places = reinterpret_cast<const T**>(scratch.places);
  const T** next = places + first;
  from.for_each_page(block + first, end - first, [&](const T* row, int64_t count) {
    for (; count > 0; --count, row += from.stride()) *next++ = row;
  });
  return {{nullptr, 0, first, end, dim, ask}, places};
}

}  // namespace baton::cpu::BATON_ISA
