// The tensor core kernels of ragged_attention for bfloat16 with a block table.
#include "cuda/ragged_attention/decode.h"
#include "cuda/ragged_attention/prefill.h"

namespace baton::cuda {

template cudaError_t launch_decode<__nv_bfloat16, true>(const AttentionArgs&, dim3, cudaStream_t);
template cudaError_t launch_prefill<__nv_bfloat16, true>(const AttentionArgs&, int, dim3,
                                                         cudaStream_t);

}  // namespace baton::cuda
