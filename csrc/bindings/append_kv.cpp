// append_kv: index values and the CPU call.
#include "bindings/append_kv.h"

#include "bindings/box.h"
#include "bindings/index_memo.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

void check_rows(const Checker& check, const AppendKvParams& p) {
  std::vector<ColumnRange> targets;
  targets.reserve(p.num_rows);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("columns", i, p.columns[i], 0, p.sizes.capacity - 1);
    targets.push_back({p.slots[i], static_cast<int32_t>(i), p.columns[i], p.columns[i] + 1});
  }
  if (const auto [a, b] = find_overlap(targets); a >= 0) {
    check.fail(
        "slots and columns", "distinct",
        format("rows ", a, " and ", b, " both in slot ", p.slots[a], ", column ", p.columns[a]));
  }
}

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  static void check_values(const Checker& check, const AppendKvParams& p) {
    thread_local IndexMemo checked;
    const std::initializer_list<int64_t> limits{p.sizes.num_slots, p.sizes.capacity};
    const std::initializer_list<IndexMemo::Values> values{{p.slots, p.num_rows},
                                                          {p.columns, p.num_rows}};
    if (checked.holds(limits, values)) return;
    check_rows(check, p);
    checked.keep(limits, values);
  }

  void run(const AppendKvParams& p, const Tensor&) const {
    const int64_t bytes =
        p.num_rows * (2 * p.sizes.num_kv_heads + p.num_heads) * p.sizes.head_dim * size_of(p.dtype);
    const auto& kernel = cpu::kernels().append_kv;
    for_each_item(
        append_kv_work(p), bytes, [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 4);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("append_kv", box<&append_kv<Cpu>>);
  library.impl("append_kv.query", box<&append_kv_query<Cpu>>);
  library.impl("append_kv.scaled", box<&append_kv_scaled<Cpu>>);
  library.impl("append_kv.scaled_query", box<&append_kv_scaled_query<Cpu>>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("append_kv", box_lazy<&append_kv<Cpu>>);
  library.impl("append_kv.query", box_lazy<&append_kv_query<Cpu>>);
  library.impl("append_kv.scaled", box_lazy<&append_kv_scaled<Cpu>>);
  library.impl("append_kv.scaled_query", box_lazy<&append_kv_scaled_query<Cpu>>);
}

}  // namespace baton::bindings
