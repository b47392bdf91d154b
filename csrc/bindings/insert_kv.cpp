// insert_kv: index values and the CPU call.
#include "bindings/insert_kv.h"

#include "bindings/box.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  static void check_values(const Checker& check, const InsertKvParams& p) {
    check.cumulative("cu_seqlens", p.cu_seqlens, p.num_queries + 1, p.total_tokens, "total_tokens");
    std::vector<ColumnRange> targets;
    for (int64_t i = 0; i < p.num_queries; ++i) {
      const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
      check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
      check.in_range("starts", i, p.starts[i], 0, p.sizes.capacity - length);
      // Clearing the padding writes it too.
      const int64_t first = p.zero_padding ? 0 : p.starts[i];
      targets.push_back({p.slots[i], static_cast<int32_t>(i), first, p.starts[i] + length});
    }
    if (const auto [a, b] = find_overlap(targets); a >= 0) {
      check.fail("slots and starts", "targets that do not overlap",
                 format("queries ", a, " and ", b, " in slot ", p.slots[a]));
    }
  }

  void run(const InsertKvParams& p, const Tensor&) const {
    const auto& kernel = cpu::kernels().insert_kv;
    const int64_t items = insert_kv_work(p);
    for_each_item(
        items, 2 * insert_kv_bytes(p), [&](int64_t begin, int64_t end) { kernel(p, begin, end); },
        kNeighbors);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("insert_kv", box<&insert_kv<Cpu>>);
  library.impl("insert_kv.scaled", box<&insert_kv_scaled<Cpu>>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("insert_kv", box_lazy<&insert_kv<Cpu>>);
  library.impl("insert_kv.scaled", box_lazy<&insert_kv_scaled<Cpu>>);
}

}  // namespace baton::bindings
