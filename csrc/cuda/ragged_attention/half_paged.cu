// The tensor core kernels of ragged_attention for float16 with a block table.
#include "cuda/ragged_attention/decode.h"
#include "cuda/ragged_attention/prefill.h"

namespace baton::cuda {

template cudaError_t launch_decode<__half, true>(const AttentionArgs&, dim3, cudaStream_t);
template cudaError_t launch_prefill<__half, true>(const AttentionArgs&, int, dim3, cudaStream_t);

}  // namespace baton::cuda
