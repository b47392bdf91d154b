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
// into different banks: head_dim / 8 is even, so the pitch is an odd number of chunks.
constexpr int prefill_pitch(int head_dim) { return head_dim + 8; }

// Dims of the queries that stay in registers. Sums of 256 dims take 128, which leaves room for
// an eighth of the queries (sm_75 needs the most); ldmatrix brings the others from shared memory,
// all 64 KB of which a block then takes there.
constexpr int prefill_register_dims(int head_dim) { return head_dim <= 128 ? head_dim : 32; }

// Elements of the two stages, then of the queries that are not in registers.
constexpr int prefill_cache_elements(int head_dim) {
  return 2 * kPrefillStages * prefill_keys(head_dim) * prefill_pitch(head_dim);
}
constexpr int prefill_query_pitch(int head_dim) {
  return head_dim <= 128 ? 0 : prefill_pitch(head_dim - prefill_register_dims(head_dim));
}
// Bytes before what each thread parks, 16 bytes.
constexpr std::size_t prefill_parked(int head_dim) {
  return std::size_t{2} *
         (prefill_cache_elements(head_dim) + kTileVectors * prefill_query_pitch(head_dim));
}
constexpr std::size_t prefill_shared_bytes(int head_dim) {
  return prefill_parked(head_dim) + 16 * kAttentionThreads;
}

}  // namespace baton::cuda
