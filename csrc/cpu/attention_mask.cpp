// attention_mask on the CPU: one work item writes one query's key_length elements, each once.
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

namespace {

template <typename Element>
void fill(Element* row, int64_t begin, int64_t end, uint32_t bits) {
  for (int64_t c = begin; c < end; ++c) row[c] = static_cast<Element>(bits);
}

template <typename Element>
void mask_row(const AttentionMaskParams& p, int64_t index) {
  const int64_t row = index / p.query_length, query = index % p.query_length;
  const int64_t start = p.starts[row];
  const int64_t own_column = start + p.lengths[row] - p.query_length + query;
  int64_t first = start, last = own_column + 1;
  if (p.window > 0 && own_column - p.window + 1 > first) first = own_column - p.window + 1;
  if (last > p.key_length) last = p.key_length;
  if (first > p.key_length) first = p.key_length;
  if (last < first) last = first;
  Element* mask = static_cast<Element*>(p.mask) + index * p.key_length;
  fill(mask, 0, first, p.hidden_bits);
  fill(mask, first, last, p.visible_bits);
  fill(mask, last, p.key_length, p.hidden_bits);
}

}  // namespace

void attention_mask(const AttentionMaskParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    if (p.element_size == 1) {
      mask_row<uint8_t>(p, i);
    } else if (p.element_size == 2) {
      mask_row<uint16_t>(p, i);
    } else if (p.element_size == 4) {
      mask_row<uint32_t>(p, i);
    } else {
      dispatch_failed("mask element size", p.element_size);
    }
  }
}

}  // namespace baton::cpu::BATON_ISA
