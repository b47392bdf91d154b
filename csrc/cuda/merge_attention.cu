// merge_attention: exact combination of two attentions over disjoint keys, from their lse.
//   lse = log(exp(lse_a) + exp(lse_b));  out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)
//
// A thread has one chunk (16 bytes where alignment allows) of one query head's output, or several
// of a head that has more chunks than a block has threads; neighboring lanes have neighboring
// chunks, then the next head. Every thread computes both weights itself, and the first of a head
// writes its lse. A partial that saw nothing (lse = -inf) is not read, so that what it left in its
// output cannot matter.
#include "cuda/device/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int kThreads = 128;

struct MergeArgs {
  MergeAttentionParams p;  // strides in bytes
  int32_t chunks;          // of a head
  int32_t lanes;           // threads of a head
};

template <typename T, int kElements>
__global__ void __launch_bounds__(kThreads)
    merge_attention_kernel(const __grid_constant__ MergeArgs args) {
  constexpr int kBytes = kElements * int{sizeof(T)};
  const MergeAttentionParams& p = args.p;
  const int32_t lane = threadIdx.x % args.lanes, heads_per_block = kThreads / args.lanes;
  const int32_t local_head = threadIdx.x / args.lanes;
  const int64_t index = int64_t{blockIdx.x} * heads_per_block + local_head;
  if (local_head >= heads_per_block || index >= p.num_queries * p.num_heads) return;
  const int64_t query = index / p.num_heads, head = index % p.num_heads;
  const float lse_a = p.lse_a[index], lse_b = p.lse_b[index];
  const float nothing = -INFINITY;
  const bool has_a = lse_a != nothing, has_b = lse_b != nothing;
  float lse = has_a ? lse_a : lse_b, share_a = 0, share_b = 0;
  if (has_a && has_b) {
    const float top = fmaxf(lse_a, lse_b);
    const float weight_a = expf(lse_a - top), weight_b = expf(lse_b - top);
    const float total = weight_a + weight_b;
    lse = top + logf(total);
    share_a = weight_a / total;
    share_b = weight_b / total;
  }
  const char* out_a = static_cast<const char*>(p.out_a) + query * p.out_a_strides.token_stride +
                      head * p.out_a_strides.head_stride;
  const char* out_b = static_cast<const char*>(p.out_b) + query * p.out_b_strides.token_stride +
                      head * p.out_b_strides.head_stride;
  char* out = static_cast<char*>(p.out) + index * args.chunks * kBytes;
  for (int32_t chunk = lane; chunk < args.chunks; chunk += args.lanes) {
    Elements<T, kElements> a, b;
    a.chunk = Chunk<kBytes>{};  // what stays when neither saw anything
    if (has_a) a.chunk = load_chunk<kBytes>(out_a + chunk * kBytes);
    if (has_b) b.chunk = load_chunk<kBytes>(out_b + chunk * kBytes);
    if (has_a && has_b) {
      float x[kElements], y[kElements];
      a.load(x);
      b.load(y);
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] = x[i] * share_a + y[i] * share_b;
      a.store(x);
    } else if (has_b) {
      a.chunk = b.chunk;  // its bits, unchanged
    }
    store_chunk<kBytes>(out + chunk * kBytes, a.chunk);
  }
  if (lane == 0) p.lse[index] = lse;
}

}  // namespace

cudaError_t merge_attention(const MergeAttentionParams& params, cudaStream_t stream) {
  MergeArgs args{};
  MergeAttentionParams& p = args.p = params;
  p.out_a_strides = in_bytes(p.out_a_strides, p.dtype);
  p.out_b_strides = in_bytes(p.out_b_strides, p.dtype);
  const int64_t head_bytes = p.head_dim * size_of(p.dtype);
  if (p.num_queries * p.num_heads == 0) return cudaSuccess;
  ChunkSize size;
  size << head_bytes << p.out_a << p.out_b << p.out << p.out_a_strides << p.out_b_strides;
  args.chunks = static_cast<int32_t>(head_bytes / size.bytes());
  // A head of no elements still has an lse.
  args.lanes = args.chunks == 0 ? 1 : args.chunks < kThreads ? args.chunks : kThreads;
  const int64_t blocks = divide_up(p.num_queries * p.num_heads, kThreads / args.lanes);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    dispatch_int<16, 4, 2>(size.bytes(), [&]<int kBytes>() {
      // A chunk never splits an element.
      if constexpr (kBytes >= int{sizeof(T)}) {
        error = launch(merge_attention_kernel<T, kBytes / int{sizeof(T)}>,
                       dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, args);
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
