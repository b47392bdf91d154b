// move_kv on the CPU: one work item moves the columns of one move for one layer and KV head. Within
// a slot, columns are copied in the order in which the target overwrites none still to be read.
#include "cpu/kernels.h"
#include "cpu/simd/copy.h"

namespace baton::cpu::BATON_ISA {

namespace {

// The (layer, move, head) of a work item.
struct MoveItem {
  int64_t layer, move, head;
};

// An element has `bytes` bytes and a column `size` elements.
void move_one(const MoveKvParams& p, const MoveItem& item, bool streams, void* cache,
              const CacheStrides& strides, int64_t bytes, int64_t size) {
  const int64_t row_bytes = bytes * size;
  const int64_t column_bytes = bytes * strides.column_stride;
  const int64_t count = p.lengths[item.move];
  const int64_t source_start = p.source_starts[item.move];
  const int64_t target_start = p.target_starts[item.move];
  char* base = static_cast<char*>(cache);
  const char* source = base + bytes * offset(strides, item.layer, p.source_slots[item.move],
                                             item.head, source_start);
  char* target = base + bytes * offset(strides, item.layer, p.target_slots[item.move], item.head,
                                       target_start);
  if (source == target) return;
  const bool is_apart = p.source_slots[item.move] != p.target_slots[item.move] ||
                        target_start + count <= source_start ||
                        source_start + count <= target_start;
  if (is_apart)
    return copy_rows_away(streams, target, column_bytes, source, column_bytes, count, row_bytes);
  if (column_bytes == row_bytes) {
    __builtin_memmove(target, source, count * row_bytes);
    return;
  }
  // Columns never overlap each other, so only the order of whole columns matters.
  const bool backwards = target_start > source_start;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = backwards ? count - 1 - i : i;
    __builtin_memcpy(target + column * column_bytes, source + column * column_bytes, row_bytes);
  }
}

}  // namespace

void move_kv(const MoveKvParams& p, int64_t begin, int64_t end) {
  const int64_t heads = p.sizes.num_kv_heads;
  const bool streams = move_kv_bytes(p) >= kStreamBytes;
  for (int64_t i = begin; i < end; ++i) {
    const MoveItem item{i / (p.num_moves * heads), i / heads % p.num_moves, i % heads};
    const int64_t bytes = size_of(p.dtype), dim = p.sizes.head_dim;
    move_one(p, item, streams, p.key_cache, p.key_cache_strides, bytes, dim);
    move_one(p, item, streams, p.value_cache, p.value_cache_strides, bytes, dim);
    if (is_eight_bit(p.dtype)) {
      move_one(p, item, streams, p.scales.key, p.scales.key_strides, kScaleBytes, 1);
      move_one(p, item, streams, p.scales.value, p.scales.value_strides, kScaleBytes, 1);
    }
  }
  if (streams) end_stream();
}

}  // namespace baton::cpu::BATON_ISA
