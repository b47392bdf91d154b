// The segments of a row's keys, whose partial results ragged_attention merges in order.
//
// They begin at fixed keys, counted from the row's first token: neither the row's length nor how
// its query tokens are cut into calls, tiles or threads moves them. That makes the bits of a token
// depend on its position only. Segments grow along the row, so that the partial results of a long
// row stay small beside its keys: 131072 keys are 70 segments.
#pragma once

#include <cstdint>

namespace baton {

// Segments of the same length before longer ones begin.
constexpr int64_t kAttentionSegmentRun = 32;
// The shortest segment hides writing and merging its partial result behind reading its keys.
constexpr int64_t kAttentionSegmentKeys[] = {512, 2048, 8192};

// The first key of a segment.
static inline int64_t attention_segment_begin(int64_t segment) {
  int64_t begin = 0;
  for (int i = 0; i < 2; ++i) {
    if (segment <= kAttentionSegmentRun) return begin + segment * kAttentionSegmentKeys[i];
    begin += kAttentionSegmentRun * kAttentionSegmentKeys[i];
    segment -= kAttentionSegmentRun;
  }
  return begin + segment * kAttentionSegmentKeys[2];
}

// The segment that holds a key.
static inline int64_t attention_segment_of(int64_t key) {
  int64_t segment = 0;
  for (int i = 0; i < 2; ++i) {
    const int64_t keys = kAttentionSegmentRun * kAttentionSegmentKeys[i];
    if (key < keys) return segment + key / kAttentionSegmentKeys[i];
    segment += kAttentionSegmentRun;
    key -= keys;
  }
  return segment + key / kAttentionSegmentKeys[2];
}

}  // namespace baton
