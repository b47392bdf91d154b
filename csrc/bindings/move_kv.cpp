// move_kv: index values and the CPU call.
#include "bindings/move_kv.h"

#include <algorithm>

#include "bindings/box.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

// Targets must not overlap each other, nor the source of another move: the result would depend on
// the order of the moves.
void check_overlaps(const Checker& check, const MoveKvParams& p) {
  std::vector<ColumnRange> targets;
  for (int64_t i = 0; i < p.num_moves; ++i) {
    targets.push_back({p.target_slots[i], static_cast<int32_t>(i), p.target_starts[i],
                       p.target_starts[i] + int64_t{p.lengths[i]}});
  }
  // Leaves the targets sorted by slot and column, and disjoint.
  if (const auto [a, b] = find_overlap(targets); a >= 0) {
    check.fail("targets", "disjoint",
               format("moves ", a, " and ", b, " in slot ", p.target_slots[a]));
  }
  for (int64_t i = 0; i < p.num_moves; ++i) {
    const int32_t slot = p.source_slots[i];
    const int64_t begin = p.source_starts[i], end = begin + p.lengths[i];
    if (begin == end) continue;
    auto target =
        std::upper_bound(targets.begin(), targets.end(), std::pair{slot, begin},
                         [](const std::pair<int32_t, int64_t>& at, const ColumnRange& r) {
                           return at.first != r.slot ? at.first < r.slot : at.second < r.end;
                         });
    for (; target != targets.end() && target->slot == slot && target->begin < end; ++target) {
      if (target->entry != i) {
        check.fail("targets", "outside the sources of other moves",
                   format("the target of move ", target->entry, " in the source of move ", i));
      }
    }
  }
}

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  static void check_values(const Checker& check, const MoveKvParams& p) {
    for (int64_t i = 0; i < p.num_moves; ++i) {
      check.in_range("lengths", i, p.lengths[i], 0, p.sizes.capacity);
      check.in_range("source_slots", i, p.source_slots[i], 0, p.sizes.num_slots - 1);
      check.in_range("target_slots", i, p.target_slots[i], 0, p.sizes.num_slots - 1);
      check.in_range("source_starts", i, p.source_starts[i], 0, p.sizes.capacity - p.lengths[i]);
      check.in_range("target_starts", i, p.target_starts[i], 0, p.sizes.capacity - p.lengths[i]);
    }
    check_overlaps(check, p);
  }

  void run(const MoveKvParams& p, const Tensor&) const {
    const auto& kernel = cpu::kernels().move_kv;
    for_each_item(move_kv_work(p), 2 * move_kv_bytes(p),
                  [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("move_kv", box<&move_kv<Cpu>>);
  library.impl("move_kv.scaled", box<&move_kv_scaled<Cpu>>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("move_kv", box_lazy<&move_kv<Cpu>>);
  library.impl("move_kv.scaled", box_lazy<&move_kv_scaled<Cpu>>);
}

}  // namespace baton::bindings
