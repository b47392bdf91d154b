// attention_mask: query j of row i stands in column c_q = starts[i] + lengths[i] - query_length + j
// and sees column c when starts[i] <= c <= c_q and c > c_q - window.
#pragma once

#include <cstdint>

namespace baton {

struct AttentionMaskParams {
  const int32_t* starts;   // [num_rows]
  const int32_t* lengths;  // [num_rows]
  void* mask;              // [num_rows, 1, query_length, key_length], contiguous
  int64_t num_rows, query_length, key_length;
  int64_t window;         // 0: no window
  int64_t element_size;   // bytes of one element of mask: 1, 2 or 4
  uint32_t visible_bits;  // the element that says visible, and hidden, as raw bits
  uint32_t hidden_bits;
};

// One work item is one (row, query).
static inline int64_t attention_mask_work(const AttentionMaskParams& p) {
  return p.num_rows * p.query_length;
}

}  // namespace baton
