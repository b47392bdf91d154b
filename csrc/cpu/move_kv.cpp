// move_kv on the CPU: one work item moves one move's columns of one layer and KV head. A move
// inside one slot runs from the end that its own target does not overwrite.
#include "cpu/copy.h"
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

namespace {

void move_one(const MoveKvParams& p, const CopyItem& item, void* cache,
              const CacheStrides& strides) {
  const int64_t bytes = size_of(p.dtype);
  const int64_t row_bytes = bytes * p.sizes.head_dim;
  const int64_t column_bytes = bytes * strides.column_stride;
  const int64_t count = p.lengths[item.query];
  const int64_t source_start = p.source_starts[item.query];
  const int64_t target_start = p.target_starts[item.query];
  char* base = static_cast<char*>(cache);
  const char* source = base + bytes * offset(strides, item.layer, p.source_slots[item.query],
                                             item.head, source_start);
  char* target = base + bytes * offset(strides, item.layer, p.target_slots[item.query], item.head,
                                       target_start);
  if (source == target) return;
  const bool is_apart = p.source_slots[item.query] != p.target_slots[item.query] ||
                        target_start + count <= source_start ||
                        source_start + count <= target_start;
  if (is_apart) return copy_rows_away(target, column_bytes, source, column_bytes, count, row_bytes);
  if (column_bytes == row_bytes) {
    __builtin_memmove(target, source, count * row_bytes);
    return;
  }
  // Columns never overlap each other, only the order of whole columns matters.
  const bool backwards = target_start > source_start;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t column = backwards ? count - 1 - i : i;
    __builtin_memcpy(target + column * column_bytes, source + column * column_bytes, row_bytes);
  }
}

}  // namespace

void move_kv(const MoveKvParams& p, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const CopyItem item = copy_item(i, p.num_moves, p.sizes.num_kv_heads);
    move_one(p, item, p.key_cache, p.key_cache_strides);
    move_one(p, item, p.value_cache, p.value_cache_strides);
  }
}

}  // namespace baton::cpu::BATON_ISA
