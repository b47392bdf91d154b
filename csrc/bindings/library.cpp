// Every schema of the library. Loading it (torch.ops.load_library) runs the registrations: there is
// no Python module, so one file serves every Python.
//
// (a!) marks what a call writes. Overloads add a result or take options: a schema's results cannot
// be optional, an unwanted result costs a call half a microsecond, and so do the ten options of
// attention even when all are left out.
//
// Options are keyword-only in the Python functions but not here: torch needs half a microsecond per
// keyword of a call, more than for all checks of its tensors.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(baton_kernels, library) {
  library.def(
      "insert_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? cu_seqlens, Tensor? slots, Tensor? starts, bool zero_padding=False) -> ()");
  library.def(
      "insert_kv.scaled(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? cu_seqlens, Tensor? slots, Tensor? starts, bool zero_padding, "
      "Tensor(c!) key_scale, Tensor(d!) value_scale) -> ()");
  library.def(
      "append_kv(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? slots, Tensor columns, Tensor? cos=None, Tensor? sin=None) -> ()");
  library.def(
      "append_kv.query(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? slots, Tensor columns, Tensor query, Tensor? cos=None, Tensor? sin=None) -> Tensor");
  library.def(
      "append_kv.scaled(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? slots, Tensor columns, Tensor? cos, Tensor? sin, Tensor(c!) key_scale, "
      "Tensor(d!) value_scale) -> ()");
  library.def(
      "append_kv.scaled_query(Tensor key, Tensor value, Tensor(a!) key_cache, "
      "Tensor(b!) value_cache, Tensor? slots, Tensor columns, Tensor query, Tensor? cos, "
      "Tensor? sin, Tensor(c!) key_scale, Tensor(d!) value_scale) -> Tensor");
  library.def(
      "move_kv(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? source_slots, "
      "Tensor? source_starts, Tensor? target_slots, Tensor? target_starts, Tensor lengths) -> ()");
  library.def(
      "move_kv.scaled(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? source_slots, "
      "Tensor? source_starts, Tensor? target_slots, Tensor? target_starts, Tensor lengths, "
      "Tensor(c!) key_scale, Tensor(d!) value_scale) -> ()");
  library.def(
      "extract_kv(Tensor key_cache, Tensor value_cache, Tensor? cu_seqlens, Tensor? slots, "
      "Tensor? starts, SymInt total_tokens) -> (Tensor, Tensor)");
  library.def(
      "extract_kv.out(Tensor key_cache, Tensor value_cache, Tensor? cu_seqlens, Tensor? slots, "
      "Tensor? starts, SymInt total_tokens, Tensor(a!) key, Tensor(b!) value) -> ()");
  library.def(
      "extract_kv.scaled(Tensor key_cache, Tensor value_cache, Tensor? cu_seqlens, Tensor? slots, "
      "Tensor? starts, SymInt total_tokens, Tensor key_scale, Tensor value_scale, "
      "ScalarType? dtype=None) -> (Tensor, Tensor)");
  library.def(
      "extract_kv.scaled_out(Tensor key_cache, Tensor value_cache, Tensor? cu_seqlens, "
      "Tensor? slots, Tensor? starts, SymInt total_tokens, Tensor key_scale, Tensor value_scale, "
      "Tensor(a!) key, Tensor(b!) value) -> ()");
  library.def(
      "ragged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor? cu_seqlens_q, "
      "Tensor? slots, Tensor? starts, Tensor lengths) -> Tensor");
  library.def(
      "ragged_attention.options(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor? cu_seqlens_q, Tensor? slots, Tensor? starts, Tensor lengths, float? scale=None, "
      "bool causal=True, int? window=None, float softcap=0.0, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, SymInt? max_query_length=None, SymInt? max_length=None, "
      "Tensor? block_table=None, Tensor? key_scale=None, Tensor? value_scale=None) -> Tensor");
  library.def(
      "ragged_attention.lse(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor? cu_seqlens_q, Tensor? slots, Tensor? starts, Tensor lengths, float? scale=None, "
      "bool causal=True, int? window=None, float softcap=0.0, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, SymInt? max_query_length=None, SymInt? max_length=None, "
      "Tensor? block_table=None, Tensor? key_scale=None, Tensor? value_scale=None) -> (Tensor, "
      "Tensor)");
  library.def(
      "ragged_attention.out(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor? cu_seqlens_q, Tensor? slots, Tensor? starts, Tensor lengths, float? scale=None, "
      "bool causal=True, int? window=None, float softcap=0.0, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, SymInt? max_query_length=None, SymInt? max_length=None, "
      "Tensor? block_table=None, Tensor? key_scale=None, Tensor? value_scale=None, *, Tensor(a!) "
      "out) -> ()");
  library.def(
      "ragged_attention.lse_out(Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor? cu_seqlens_q, Tensor? slots, Tensor? starts, Tensor lengths, float? scale=None, "
      "bool causal=True, int? window=None, float softcap=0.0, Tensor? alibi_slopes=None, "
      "Tensor? sinks=None, SymInt? max_query_length=None, SymInt? max_length=None, "
      "Tensor? block_table=None, Tensor? key_scale=None, Tensor? value_scale=None, *, Tensor(a!) "
      "out, Tensor(b!) lse) -> ()");
  library.def(
      "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> (Tensor, Tensor)");
  library.def(
      "attention_mask(Tensor? starts, Tensor lengths, SymInt query_length, SymInt key_length, "
      "ScalarType dtype=bool, int? window=None) -> Tensor");
  library.def(
      "masked_softmax(Tensor scores, Tensor? starts, Tensor lengths, float scale=1.0, "
      "int? window=None) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def(
      "rms_norm.residual(Tensor x, Tensor weight, float eps, Tensor residual) -> (Tensor, Tensor)");
  library.def("silu_and_mul(Tensor x) -> Tensor");
  library.def("likeliest(Tensor logits) -> Tensor");
  library.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  // CPU only: the ops behind PackedWeight.
  library.def(
      "linear_packed(Tensor x, Tensor panels, SymInt out_features, Tensor? bias=None) -> Tensor");
  library.def(
      "linear_packed.int8(Tensor x, Tensor panels, Tensor scales, SymInt out_features, "
      "Tensor? bias=None) -> Tensor");
  library.def("quantize_linear(Tensor weight) -> (Tensor, Tensor)");
  library.def("pack_linear(Tensor weight, Tensor(a!) panels) -> ()");
  library.def(
      "unpack_linear(Tensor panels, SymInt out_features, SymInt in_features, "
      "Tensor? outputs=None) -> Tensor");
  library.def("use_torch_threads(bool use) -> ()");

  // For tests and build_info: not part of the public interface.
  library.def("set_cpu_isa(str name, bool force=False) -> ()");
  library.def("cpu_isas() -> str");
  library.def("cuda_build() -> str");  // defined by the CUDA library
}
