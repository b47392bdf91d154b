// Attention kernels of which one line is wrong: `mutants <number> <generic, tensor_core or
// warpgroup>`.
// emulation/mutants.py writes the copy of csrc/cuda that this includes. The exit status is 1 when
// the emulator reports anything.
#include <cstdlib>
#include <cstring>

// The number of the wrong line of the copy. 0: none.
static int mutant = 0;

#include "cuda/ragged_attention/decode.h"
#include "cuda/ragged_attention/prefill.h"
#include "cuda/ragged_attention/warpgroup.h"

// The one head_dim whose kernels have every barrier there is; all of them take a minute to compile.
// Specializations come before ragged_attention.cu, which uses them.
namespace baton::cuda {
template <>
cudaError_t launch_decode<__half, false>(const AttentionArgs&, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_prefill<__half, false>(const AttentionArgs&, int, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_decode<__half, true>(const AttentionArgs&, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_prefill<__half, true>(const AttentionArgs&, int, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_decode<__nv_bfloat16, true>(const AttentionArgs&, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_prefill<__nv_bfloat16, true>(const AttentionArgs&, int, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_decode<__nv_bfloat16, false>(const AttentionArgs& args, dim3 grid,
                                                cudaStream_t stream) {
  // The warpgroup kernel's call is not about it.
  if (args.p.sizes.head_dim != 256) return cudaSuccess;
  return launch(ragged_attention_decode_kernel<__nv_bfloat16, 256, 1>, grid,
                dim3(kAttentionThreads), sizeof(DecodeShared<256, 1>), stream, args);
}
template <>
cudaError_t launch_prefill<__nv_bfloat16, false>(const AttentionArgs& args, int, dim3 grid,
                                                 cudaStream_t stream) {
  return launch(ragged_attention_prefill_kernel<__nv_bfloat16, 256, 1>, grid,
                dim3(kAttentionThreads), prefill_shared_bytes(256, 1), stream, args);
}
template <>
cudaError_t launch_warpgroup<__half>(const AttentionArgs&, dim3, cudaStream_t) {
  return cudaErrorInvalidValue;
}
template <>
cudaError_t launch_warpgroup<__nv_bfloat16>(const AttentionArgs& args, dim3 grid,
                                            cudaStream_t stream) {
  return launch(ragged_attention_warpgroup_kernel<__nv_bfloat16>, grid, dim3(kWarpgroupThreads),
                sizeof(RingMemory), stream, args);
}
}  // namespace baton::cuda

#include "cuda/ragged_attention/ragged_attention.cu"
#include "emulation/cuda/attention_call.h"

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  mutant = std::atoi(argv[1]);
  emulation::options().late_copies = true;
  if (std::strcmp(argv[2], "generic") == 0) {
    calls::attend({baton::Dtype::kFloat32, 1, 1, 24}, false);
  } else if (std::strcmp(argv[2], "warpgroup") == 0) {
    calls::attend({baton::Dtype::kBFloat16, 1, 1, 128}, false, false, baton::PrefillKernel::kWgmma);
  } else {
    calls::attend({baton::Dtype::kBFloat16, 1, 1, 256}, false);
  }
  return calls::failures != 0;
}
