// merge_attention as torch calls it: checks, parameters, and the call of a device's kernel.
#pragma once

#include "bindings/checks.h"
#include "common/merge_attention.h"

namespace baton::bindings {

template <typename Device>
std::tuple<Tensor, Tensor> merge_attention(const Tensor& out_a, const Tensor& lse_a,
                                           const Tensor& out_b, const Tensor& lse_b) {
  const Checker check("merge_attention", Device::kType, out_a);
  MergeAttentionParams p{};
  p.dtype = check.floating("out_a", out_a);
  check.dtype_as("out_b", out_b, "out_a", out_a);
  check.dims("out_a", out_a, 3);
  const Sizes sizes = out_a.sizes();
  p.num_queries = sizes[0];
  p.num_heads = sizes[1];
  p.head_dim = sizes[2];
  check.shape("out_b", out_b, {p.num_queries, p.num_heads, p.head_dim});
  check.last_contiguous("out_a", out_a);
  check.last_contiguous("out_b", out_b);
  for (const auto& [name, tensor] : {std::pair{"lse_a", &lse_a}, {"lse_b", &lse_b}}) {
    check.float32(name, *tensor);
    check.shape(name, *tensor, {p.num_queries, p.num_heads});
    check.contiguous(name, *tensor);
  }

  const Device device(check, out_a);
  Tensor out = allocate(out_a, {p.num_queries, p.num_heads, p.head_dim});
  Tensor lse = allocate(lse_a, {p.num_queries, p.num_heads});
  p.out_a = out_a.const_data_ptr();
  p.out_b = out_b.const_data_ptr();
  p.lse_a = static_cast<const float*>(lse_a.const_data_ptr());
  p.lse_b = static_cast<const float*>(lse_b.const_data_ptr());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.out_a_strides = token_strides(out_a);
  p.out_b_strides = token_strides(out_b);
  device.run(p, out_a);
  return {std::move(out), std::move(lse)};
}

}  // namespace baton::bindings
