// extract_kv: index values and the CPU call.
#include "bindings/extract_kv.h"

#include "bindings/box.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  static void check_values(const Checker& check, const ExtractKvParams& p) {
    check.cumulative("cu_seqlens", p.cu_seqlens, p.num_queries + 1, p.total_tokens, "total_tokens");
    for (int64_t i = 0; i < p.num_queries; ++i) {
      const int64_t length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
      check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
      check.in_range("starts", i, p.starts[i], 0, p.sizes.capacity - length);
    }
  }

  void run(const ExtractKvParams& p, const Tensor&) const {
    const auto& kernel = cpu::kernels().extract_kv;
    const int64_t items = extract_kv_work(p);
    for_each_item(
        items, 2 * extract_kv_bytes(p), [&](int64_t begin, int64_t end) { kernel(p, begin, end); },
        kNeighbors);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("extract_kv", box<&extract_kv<Cpu>>);
  library.impl("extract_kv.out", box<&extract_kv_out<Cpu>>);
  library.impl("extract_kv.scaled", box<&extract_kv_scaled<Cpu>>);
  library.impl("extract_kv.scaled_out", box<&extract_kv_scaled_out<Cpu>>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("extract_kv.out", box_lazy<&extract_kv_out<Cpu>>);
  library.impl("extract_kv.scaled_out", box_lazy<&extract_kv_scaled_out<Cpu>>);
}

}  // namespace baton::bindings
