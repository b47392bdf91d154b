// The kernels of one instruction set. Each runs the half-open range [begin, end) of its work items
// and allocates nothing.
#pragma once

#include "common/append_kv.h"
#include "common/attention_mask.h"
#include "common/extract_kv.h"
#include "common/insert_kv.h"
#include "common/likeliest.h"
#include "common/linear.h"
#include "common/linear_packed.h"
#include "common/masked_softmax.h"
#include "common/merge_attention.h"
#include "common/move_kv.h"
#include "common/ragged_attention.h"
#include "common/rms_norm.h"
#include "common/silu_and_mul.h"

namespace baton::cpu {

// X(name, parameters) for every kernel.
#define BATON_FOR_EACH_KERNEL(X)                                                \
  X(insert_kv, const InsertKvParams&)                                           \
  X(append_kv, const AppendKvParams&)                                           \
  X(move_kv, const MoveKvParams&)                                               \
  X(extract_kv, const ExtractKvParams&)                                         \
  X(ragged_attention, const RaggedAttentionParams&, const AttentionWork&)       \
  X(ragged_attention_merge, const RaggedAttentionParams&, const AttentionWork&) \
  X(merge_attention, const MergeAttentionParams&)                               \
  X(attention_mask, const AttentionMaskParams&)                                 \
  X(masked_softmax, const MaskedSoftmaxParams&)                                 \
  X(rms_norm, const RmsNormParams&)                                             \
  X(silu_and_mul, const SiluAndMulParams&)                                      \
  X(likeliest, const LikeliestParams&)                                          \
  X(linear_pack, const LinearParams&)                                           \
  X(linear, const LinearParams&)                                                \
  X(linear_packed, const LinearPackedParams&)                                   \
  X(linear_packed_int8, const LinearPackedParams&)                              \
  X(pack_linear, const PackLinearParams&)                                       \
  X(unpack_linear, const UnpackLinearParams&)                                   \
  X(quantize_linear, const QuantizeLinearParams&)

struct KernelTable {
  // Whether linear for bfloat16 takes x packed by linear_pack; otherwise linear_pack is not used.
  bool packs_bfloat16;
  // The number of parts that linear_packed can divide a panel into.
  int64_t packed_parts;
#define BATON_DECLARE(name, ...) void (*name)(__VA_ARGS__, int64_t begin, int64_t end);
  BATON_FOR_EACH_KERNEL(BATON_DECLARE)
#undef BATON_DECLARE
};

#if defined(BATON_ISA)
namespace BATON_ISA {
// A part is three vectors of outputs, or one where vectors are long enough.
#if defined(__AVX512F__)
constexpr int64_t kPackedParts = 3;
#elif defined(__AVX2__)
constexpr int64_t kPackedParts = 2;
#else
constexpr int64_t kPackedParts = 4;
#endif
#define BATON_DECLARE(name, ...) void name(__VA_ARGS__, int64_t begin, int64_t end);
BATON_FOR_EACH_KERNEL(BATON_DECLARE)
#undef BATON_DECLARE
}  // namespace BATON_ISA
#endif

}  // namespace baton::cpu
