// The segments of a row's keys, whose partial results ragged_attention merges in order.
//
// They begin at fixed keys, counted from the row's first token, however long the row is and however
// its query tokens are cut into calls, tiles or threads. So the bits of a token depend on its
// position only. Segments grow along the row, so that the partial results of a long row stay small
// compared with its keys: 131072 keys are 70 segments.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BATON_HOST_DEVICE __host__ __device__
#else
#define BATON_HOST_DEVICE
#endif

namespace baton {

// The number of segments of one length before longer ones begin.
constexpr int64_t kAttentionSegmentRun = 32;
// Keys per segment in the first run, in the second, and in everything behind. Even the shortest
// segment is long enough to hide writing and merging its partial result behind reading its keys.
BATON_HOST_DEVICE static constexpr int64_t attention_segment_keys(int run) {
  return run == 0 ? 512 : run == 1 ? 2048 : 8192;
}

// The first key of a segment.
BATON_HOST_DEVICE static inline int64_t attention_segment_begin(int64_t segment) {
  int64_t begin = 0;
  for (int i = 0; i < 2; ++i) {
    if (segment <= kAttentionSegmentRun) return begin + segment * attention_segment_keys(i);
    begin += kAttentionSegmentRun * attention_segment_keys(i);
    segment -= kAttentionSegmentRun;
  }
  return begin + segment * attention_segment_keys(2);
}

// The segment that holds a key.
BATON_HOST_DEVICE static inline int64_t attention_segment_of(int64_t key) {
  int64_t segment = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t keys = kAttentionSegmentRun * attention_segment_keys(i);
    if (key < keys) return segment + key / attention_segment_keys(i);
    segment += kAttentionSegmentRun;
    key -= keys;
  }
  return segment + key / attention_segment_keys(2);
}

}  // namespace baton
