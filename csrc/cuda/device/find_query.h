// Which query a packed token belongs to.
#pragma once

#include "cuda/device/device.h"

namespace baton::cuda {

// The query that token t belongs to, if any: how many queries end before it or with it, or one
// less, which its caller sees. All lanes of the warp have the same token, and look at 32 ends at
// a time. kAscending: none if the ends that they look at last do not ascend; of up to 32, these are
// all.
template <bool kAscending>
__device__ __forceinline__ int32_t find_query(const int32_t* cu_seqlens, int32_t num_queries,
                                              int32_t t) {
  const int32_t place = threadIdx.x % 32 + 1;
  int32_t found = 0, left = num_queries;
  const auto ended = [&](int32_t i) {
    const bool is = i <= left && static_cast<int32_t>(load_4(cu_seqlens + found + i)) <= t;
    return __popc(__ballot_sync(~0u, is));
  };
  while (left > 32) {
    const int32_t step = (left + 31) / 32, passed = ended(place * step) * step;
    found += passed;
    // The last of the next `step` ends is known to come later, if it exists.
    left = min(left - passed, step - 1);
  }
  // A single query needs no search, and is the most frequent case.
  if (left > 1) {
    const int32_t end =
        place <= left ? static_cast<int32_t>(load_4(cu_seqlens + found + place)) : INT32_MAX;
    found += __popc(__ballot_sync(~0u, end <= t));
    if (kAscending && __any_sync(~0u, __shfl_up_sync(~0u, end, 1) > end)) found = num_queries;
  }
  return found;
}

// Whether the bounds of queries ascend. Where they do not, tokens belong to several queries or to
// none, and no query is whole. All lanes of the warp look together.
__device__ __forceinline__ bool ascends(const int32_t* cu_seqlens, int32_t num_queries) {
  for (int32_t first = 0; first < num_queries; first += 32) {
    const int32_t i = first + static_cast<int32_t>(threadIdx.x) % 32;
    const bool descends =
        i<num_queries&& static_cast<int32_t>(load_4(cu_seqlens + i))> static_cast<int32_t>(
            load_4(cu_seqlens + i + 1));
    if (__any_sync(~0u, descends)) return false;
  }
  return true;
}

}  // namespace baton::cuda
