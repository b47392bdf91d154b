// The tensor core kernels of ragged_attention for float16.
#include "cuda/ragged_attention/decode.h"
#include "cuda/ragged_attention/prefill.h"

namespace baton::cuda {

template cudaError_t launch_decode<__half, false>(const AttentionArgs&, dim3, cudaStream_t);
template cudaError_t launch_prefill<__half, false>(const AttentionArgs&, int, dim3, cudaStream_t);

}  // namespace baton::cuda
