// merge_attention: checks and the CPU call.
#include "common/merge_attention.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

std::tuple<Tensor, Tensor> merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  const Checker check("merge_attention");
  MergeAttentionParams p{};
  p.dtype = check.floating("out_a", out_a);
  check.dtype_as("out_b", out_b, "out_a", out_a);
  check.dims("out_a", out_a, 3);
  p.num_queries = out_a.size(0);
  p.num_heads = out_a.size(1);
  p.head_dim = out_a.size(2);
  check.shape("out_b", out_b, {p.num_queries, p.num_heads, p.head_dim});
  check.last_contiguous("out_a", out_a);
  check.last_contiguous("out_b", out_b);
  for (const auto& [name, tensor] : {std::pair{"lse_a", &lse_a}, {"lse_b", &lse_b}}) {
    check.float32(name, *tensor);
    check.shape(name, *tensor, {p.num_queries, p.num_heads});
    check.contiguous(name, *tensor);
  }

  Tensor out = torch::stable::new_empty(out_a, {p.num_queries, p.num_heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(lse_a, {p.num_queries, p.num_heads});
  p.out_a = out_a.const_data_ptr();
  p.out_b = out_b.const_data_ptr();
  p.lse_a = static_cast<const float*>(lse_a.const_data_ptr());
  p.lse_b = static_cast<const float*>(lse_b.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.out_a_strides = token_strides(out_a);
  p.out_b_strides = token_strides(out_b);
  const auto& kernel = cpu::kernels().merge_attention;
  for_each_item(
      merge_attention_work(p), out_a.numel() * size_of(p.dtype) * 3,
      [&](int64_t begin, int64_t end) { kernel(p, begin, end); }, 8);
  return {out, lse};
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("merge_attention", TORCH_BOX(&merge_attention));
}

}  // namespace baton::bindings
