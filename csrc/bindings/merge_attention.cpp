// merge_attention: the CPU call.
#include "bindings/merge_attention.h"

#include "bindings/box.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  void run(const MergeAttentionParams& p, const Tensor&) const {
    const int64_t bytes = p.num_queries * p.num_heads * p.head_dim * size_of(p.dtype) * 3;
    const auto& kernel = cpu::kernels().merge_attention;
    for_each_item(
        merge_attention_work(p), bytes, [&](int64_t begin, int64_t end) { kernel(p, begin, end); },
        8);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("merge_attention", box<&merge_attention<Cpu>>);
}

}  // namespace baton::bindings
