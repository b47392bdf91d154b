// The kernels of ragged_attention for compute capability 9.0 only: compiled for sm_90a.
#include "cuda/ragged_attention/warpgroup.h"

namespace baton::cuda {

template <typename T>
cudaError_t launch_warpgroup(const AttentionArgs& args, dim3 grid, cudaStream_t stream) {
  return launch(ragged_attention_warpgroup_kernel<T>, grid, dim3(kWarpgroupThreads),
                sizeof(RingMemory), stream, args);
}
template cudaError_t launch_warpgroup<__half>(const AttentionArgs&, dim3, cudaStream_t);
template cudaError_t launch_warpgroup<__nv_bfloat16>(const AttentionArgs&, dim3, cudaStream_t);

}  // namespace baton::cuda
