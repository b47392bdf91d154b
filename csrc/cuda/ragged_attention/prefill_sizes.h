// Tiles of ragged_attention's prefill kernel and the shared memory that they take.
#pragma once

#include <cstddef>

#include "cuda/ragged_attention/launch.h"

namespace baton::cuda {

constexpr int kPrefillStages = 2;

// Columns of one tile. Both stages of keys and values must fit the 64 KB of sm_75, twice into the
// 100 KB of sm_86, and the scores of a tile into the registers that sums and queries leave.
constexpr int prefill_keys(int head_dim) {
  if (head_dim <= 64) return 64;   // 36 KB
  if (head_dim <= 128) return 32;  // 22 to 34 KB
  return 16;                       // 33 KB, and 29 KB of queries
}

// A row of keys or values in shared memory. The 16 bytes between rows put eight rows' same chunk
// into different banks: head_dim / 8 is even, so the pitch is an odd number of chunks. Warps keep
// in them what they need later in an item.
constexpr int prefill_pitch(int head_dim) { return head_dim + 8; }

// Dims of the queries that stay in registers. Sums of 256 dims, or of 128 and two tiles of vectors,
// take 128, which leaves room for an eighth of the former and for none of the latter; ldmatrix
// brings the others from shared memory.
constexpr int prefill_register_dims(int head_dim, int tiles) {
  return head_dim * tiles <= 128 ? head_dim : tiles == 1 ? 32 : 0;
}

// Elements of the two stages, then of the queries that are not in registers.
constexpr int prefill_cache_elements(int head_dim) {
  return 2 * kPrefillStages * prefill_keys(head_dim) * prefill_pitch(head_dim);
}
constexpr int prefill_query_pitch(int head_dim, int tiles) {
  const int dims = head_dim - prefill_register_dims(head_dim, tiles);
  return dims == 0 ? 0 : prefill_pitch(dims);
}
constexpr std::size_t prefill_shared_bytes(int head_dim, int tiles) {
  return std::size_t{2} * (prefill_cache_elements(head_dim) +
                           tiles * kTileVectors * prefill_query_pitch(head_dim, tiles));
}

}  // namespace baton::cuda
