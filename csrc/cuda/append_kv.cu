// append_kv: rotate one token per row (optional), write its key and value into its column.
//   x1 = x[: d / 2], x2 = x[d / 2 :];  rotated = [x1 cos - x2 sin, x2 cos + x1 sin]
//
// A thread has a pair of chunks of one row: elements [i, i + n) of x1 and of x2, n filling 16
// bytes. It walks over a group of heads, keys and values, so that finding the row's place and
// loading its angles is paid once for all of them. Neighboring lanes have neighboring chunks, then
// the next row.
//   threadIdx  x: chunk pair, y: row
//   blockIdx   x: rows, y: groups of KV heads, then groups of query heads
#include "cuda/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int kThreads = 128;
// Heads whose loads are on their way together: 16 chunks, or 8 that then wait for their rotation in
// float, are what the registers of four or more blocks per SM hold.
template <bool kRotate>
constexpr int kHeadsAtOnce = kRotate ? 4 : 8;
// Heads of a thread. A query head is one tensor, a KV head two: twice as many make as much work.
constexpr int kHeads = 8;
constexpr int kQueryHeads = 2 * kHeads;

struct AppendArgs {
  AppendKvParams p;   // strides of keys, values, queries and caches in bytes
  int32_t kv_groups;  // of blockIdx.y
  bool wide_angles;  // rows of cos and sin, and their second halves, begin at multiples of 16 bytes
};

// The angles of one chunk pair.
template <int kElements>
struct Angles {
  float cos1[kElements], cos2[kElements], sin1[kElements], sin2[kElements];
};

// `wide`: the row may be read 16 bytes at a time.
template <typename Rotary, int kElements>
__device__ __forceinline__ void load_angles(const Rotary* x, bool wide,
                                            float (&angles)[kElements]) {
  constexpr int kInChunk = kMaxChunkBytes / int{sizeof(Rotary)};
  if constexpr (kElements % kInChunk == 0) {
    if (wide) {
#pragma unroll
      for (int k = 0; k < kElements; k += kInChunk) {
        Elements<Rotary, kInChunk> chunk;
        chunk.chunk = load_16(x + k);
#pragma unroll
        for (int i = 0; i < kInChunk; ++i) angles[k + i] = to_float(chunk.values[i]);
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kElements; ++k) angles[k] = to_float(x[k]);
}

template <typename T, int kElements>
__device__ __forceinline__ void rotate(Elements<T, kElements>& x1, Elements<T, kElements>& x2,
                                       const Angles<kElements>& angles) {
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float a = to_float(x1.values[k]), b = to_float(x2.values[k]);
    x1.values[k] = from_float<T>(a * angles.cos1[k] - b * angles.sin1[k]);
    x2.values[k] = from_float<T>(b * angles.cos2[k] + a * angles.sin2[k]);
  }
}

// A chunk pair of one head after another, in memory.
struct Heads {
  const char* source;
  int64_t source_stride;
  char* target;
  int64_t target_stride;
};

// kCount heads; all loads come before the first store.
template <typename T, int kElements, bool kRotate, int kCount>
__device__ __forceinline__ void put_at_once(Heads& heads, int32_t half_bytes,
                                            const Angles<kElements>& angles) {
  constexpr int kBytes = kElements * int{sizeof(T)};
  Elements<T, kElements> x1[kCount], x2[kCount];
#pragma unroll
  for (int h = 0; h < kCount; ++h) {
    x1[h].chunk = load_chunk<kBytes>(heads.source);
    x2[h].chunk = load_chunk<kBytes>(heads.source + half_bytes);
    heads.source += heads.source_stride;
  }
#pragma unroll
  for (int h = 0; h < kCount; ++h) {
    if constexpr (kRotate) rotate(x1[h], x2[h], angles);
    store_chunk<kBytes>(heads.target, x1[h].chunk);
    store_chunk<kBytes>(heads.target + half_bytes, x2[h].chunk);
    heads.target += heads.target_stride;
  }
}

template <typename T, int kElements, bool kRotate>
__device__ __forceinline__ void put(Heads heads, int32_t half_bytes, int32_t count,
                                    const Angles<kElements>& angles) {
  constexpr int kAtOnce = kHeadsAtOnce<kRotate>;
#pragma unroll 1
  for (; count >= kAtOnce; count -= kAtOnce) {
    put_at_once<T, kElements, kRotate, kAtOnce>(heads, half_bytes, angles);
  }
#pragma unroll 1
  for (; count > 0; --count) put_at_once<T, kElements, kRotate, 1>(heads, half_bytes, angles);
}

template <typename T, typename Rotary, int kElements, bool kRotate>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendArgs args) {
  constexpr int kBytes = kElements * int{sizeof(T)};
  const AppendKvParams& p = args.p;
  const int32_t pair = threadIdx.x;
  const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= p.num_rows) return;
  const int32_t half = static_cast<int32_t>(p.sizes.head_dim) / 2;
  const int32_t half_bytes = half * int{sizeof(T)};

  Angles<kElements> angles;
  if constexpr (kRotate) {
    const int32_t i = pair * kElements;
    const Rotary* cos = static_cast<const Rotary*>(p.cos) + row * p.cos_row_stride + i;
    const Rotary* sin = static_cast<const Rotary*>(p.sin) + row * p.sin_row_stride + i;
    load_angles(cos, args.wide_angles, angles.cos1);
    load_angles(sin, args.wide_angles, angles.sin1);
    // With rotary_dim = head_dim / 2 both halves share one set of angles.
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      angles.cos2[k] = angles.cos1[k];
      angles.sin2[k] = angles.sin1[k];
    }
    if (p.rotary_dim != half) {
      load_angles(cos + half, args.wide_angles, angles.cos2);
      load_angles(sin + half, args.wide_angles, angles.sin2);
    }
  }

  const int32_t group = blockIdx.y;
  if (group >= args.kv_groups) {
    const int32_t head = (group - args.kv_groups) * kQueryHeads;
    const int64_t head_bytes = p.sizes.head_dim * int{sizeof(T)};
    const int32_t count = min(static_cast<int32_t>(p.num_heads) - head, kQueryHeads);
    put<T, kElements, kRotate>(
        {static_cast<const char*>(p.query) + row * p.query_strides.token_stride +
             head * p.query_strides.head_stride + pair * kBytes,
         p.query_strides.head_stride,
         static_cast<char*>(p.rotated_query) + (row * p.num_heads + head) * head_bytes +
             pair * kBytes,
         head_bytes},
        half_bytes, count, angles);
    return;
  }
  const int32_t slot = p.slots[row], column = p.columns[row];
  if (slot < 0 || slot >= p.sizes.num_slots || column < 0 || column >= p.sizes.capacity) return;
  const int32_t head = group * kHeads;
  const int32_t count = min(static_cast<int32_t>(p.sizes.num_kv_heads) - head, kHeads);
  const auto heads = [&](const void* x, const TokenStrides& token, void* cache,
                         const CacheStrides& s) {
    return Heads{static_cast<const char*>(x) + row * token.token_stride + head * token.head_stride +
                     pair * kBytes,
                 token.head_stride,
                 static_cast<char*>(cache) + slot * s.slot_stride + head * s.head_stride +
                     column * s.column_stride + pair * kBytes,
                 s.head_stride};
  };
  put<T, kElements, kRotate>(heads(p.key, p.key_strides, p.key_cache, p.key_cache_strides),
                             half_bytes, count, angles);
  put<T, kElements, false>(heads(p.value, p.value_strides, p.value_cache, p.value_cache_strides),
                           half_bytes, count, angles);
}

// Bytes of a chunk that all addresses allow and that fill half a head evenly.
int chunk_bytes(const AppendKvParams& p) {
  ChunkSize size;
  size << p.sizes.head_dim / 2 * size_of(p.dtype) << p.key << p.value << p.query << p.rotated_query
       << p.key_cache << p.value_cache << p.key_strides << p.value_strides << p.query_strides
       << p.key_cache_strides << p.value_cache_strides;
  return size.bytes();
}

template <typename T, typename Rotary, int kElements>
cudaError_t launch_append(const AppendArgs& args, dim3 grid, dim3 block, cudaStream_t stream) {
  return args.p.cos
             ? launch(append_kv_kernel<T, Rotary, kElements, true>, grid, block, 0, stream, args)
             : launch(append_kv_kernel<T, T, kElements, false>, grid, block, 0, stream, args);
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  AppendArgs args{};
  AppendKvParams& p = args.p = params;
  p.key_strides = in_bytes(p.key_strides, p.dtype);
  p.value_strides = in_bytes(p.value_strides, p.dtype);
  p.query_strides = in_bytes(p.query_strides, p.dtype);
  p.key_cache_strides = in_bytes(p.key_cache_strides, p.dtype);
  p.value_cache_strides = in_bytes(p.value_cache_strides, p.dtype);
  if (!p.query) p.num_heads = 0;
  const int bytes = chunk_bytes(p);
  const int64_t pairs = p.sizes.head_dim / 2 * size_of(p.dtype) / bytes;
  const int64_t rows = kThreads / pairs;
  args.kv_groups = static_cast<int32_t>(divide_up(p.sizes.num_kv_heads, kHeads));
  const int64_t rotary_bytes = size_of(p.rotary_dtype);
  ChunkSize angles;
  angles << p.cos << p.sin << p.cos_row_stride * rotary_bytes << p.sin_row_stride * rotary_bytes
         << p.sizes.head_dim / 2 * rotary_bytes;
  args.wide_angles = angles.bytes() == kMaxChunkBytes;
  const int64_t groups = args.kv_groups + divide_up(p.num_heads, kQueryHeads);
  const int64_t blocks = divide_up(p.num_rows, rows);
  if (blocks == 0 || groups == 0) return cudaSuccess;
  if (blocks > INT32_MAX || groups > 65535) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(groups));
  const dim3 block(static_cast<unsigned>(pairs), static_cast<unsigned>(rows));
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    dispatch_int<16, 4, 2>(bytes, [&]<int kBytes>() {
      // A chunk never splits an element.
      if constexpr (kBytes >= int{sizeof(T)}) {
        constexpr int kElements = kBytes / int{sizeof(T)};
        error = p.rotary_dtype == Dtype::kFloat32
                    ? launch_append<T, float, kElements>(args, grid, block, stream)
                    : launch_append<T, T, kElements>(args, grid, block, stream);
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
