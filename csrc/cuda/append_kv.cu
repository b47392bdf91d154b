// append_kv: rotate one token per row (optional), write its key and value into its column.
//   x1 = x[: d / 2], x2 = x[d / 2 :];  rotated = [x1 cos - x2 sin, x2 cos + x1 sin]
//
// A thread has a pair of chunks of one row: elements [i, i + n) of x1 and of x2, n filling 16
// bytes. It walks over heads of the queries, then of keys and values together, so that finding the
// row's place and loading its angles is paid once for all of them. The angles of a row are read by
// one warp, or, when there are few rows, by several that have a part of the pairs each: in any case
// once. Neighboring lanes have neighboring chunks, then the next head, then the next row.
//   threadIdx  x: chunk pair, y: first head, z: row
//   blockIdx   x: rows, y: part of the pairs
#include <algorithm>

#include "cuda/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int kThreads = 128, kWarp = 32;
// Query heads whose loads are on their way together, and twice the heads of keys and values: 16
// chunks, or 8 that then wait for their rotation in float, are what the registers of four or more
// blocks per SM hold.
template <bool kRotate>
constexpr int kHeadsAtOnce = kRotate ? 4 : 8;
// Fewer rows than this leave most SMs of a large device without a warp: they get several each.
constexpr int64_t kFewRows = 64;
// Blocks of more than one warp only when there is such a block for every SM of the largest device.
constexpr int64_t kWantedBlocks = 148;

struct AppendArgs {
  AppendKvParams p;  // strides of keys, values, queries and caches in bytes
  int32_t num_rows, num_heads, num_kv_heads, num_slots;
  int32_t half;      // elements of half a head
  bool wide_angles;  // rows of cos and sin, and their second halves, begin at multiples of 16 bytes
};

// The angles of one chunk pair.
template <int kElements>
struct Angles {
  float cos1[kElements], minus_sin1[kElements], cos2[kElements], sin2[kElements];
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
        float part[kInChunk];
        chunk.load(part);
#pragma unroll
        for (int i = 0; i < kInChunk; ++i) angles[k + i] = part[i];
      }
      return;
    }
  }
#pragma unroll
  for (int k = 0; k < kElements; ++k) angles[k] = to_float(x[k]);
}

// Written out as in the CPU kernel, whose bits these are.
template <typename T, int kElements>
__device__ __forceinline__ void rotate(Elements<T, kElements>& x1, Elements<T, kElements>& x2,
                                       const Angles<kElements>& angles) {
  float a[kElements], b[kElements];
  x1.load(a);
  x2.load(b);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float rotated = fmaf(a[k], angles.cos1[k], __fmul_rn(b[k], angles.minus_sin1[k]));
    b[k] = fmaf(b[k], angles.cos2[k], __fmul_rn(a[k], angles.sin2[k]));
    a[k] = rotated;
  }
  x1.store(a);
  x2.store(b);
}

// A chunk pair of one head after another, in memory.
struct Heads {
  const char* source;
  int64_t source_step;
  char* target;
  int64_t target_step;
};

// The chunk pairs of kCount heads, in registers.
template <typename T, int kElements, int kCount>
class Pairs {
  static constexpr int kBytes = kElements * int{sizeof(T)};
  Elements<T, kElements> x1_[kCount], x2_[kCount];

 public:
  __device__ __forceinline__ void load(Heads& heads, int32_t half_bytes) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      x1_[h].chunk = load_chunk<kBytes>(heads.source);
      x2_[h].chunk = load_chunk<kBytes>(heads.source + half_bytes);
      heads.source += heads.source_step;
    }
  }
  template <bool kRotate>
  __device__ __forceinline__ void store(Heads& heads, int32_t half_bytes,
                                        const Angles<kElements>& angles) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      if constexpr (kRotate) rotate(x1_[h], x2_[h], angles);
      store_chunk<kBytes>(heads.target, x1_[h].chunk);
      store_chunk<kBytes>(heads.target + half_bytes, x2_[h].chunk);
      heads.target += heads.target_step;
    }
  }
};

// Every blockDim.y-th of so many heads; all loads of kAtOnce come before the first store.
template <typename T, int kElements, bool kRotate, int kAtOnce = kHeadsAtOnce<kRotate>>
__device__ __forceinline__ void put(Heads& heads, int32_t count, int32_t half_bytes,
                                    const Angles<kElements>& angles) {
  const int32_t step = blockDim.y;
#pragma unroll 1
  for (; count > (kAtOnce - 1) * step; count -= kAtOnce * step) {
    Pairs<T, kElements, kAtOnce> x;
    x.load(heads, half_bytes);
    x.template store<kRotate>(heads, half_bytes, angles);
  }
  if constexpr (kAtOnce > 1) {
    put<T, kElements, kRotate, kAtOnce / 2>(heads, count, half_bytes, angles);
  }
}

// As put(), of keys and values.
template <typename T, int kElements, bool kRotate, int kAtOnce = kHeadsAtOnce<kRotate> / 2>
__device__ __forceinline__ void put(Heads& keys, Heads& values, int32_t count, int32_t half_bytes,
                                    const Angles<kElements>& angles) {
  const int32_t step = blockDim.y;
#pragma unroll 1
  for (; count > (kAtOnce - 1) * step; count -= kAtOnce * step) {
    Pairs<T, kElements, kAtOnce> key, value;
    key.load(keys, half_bytes);
    value.load(values, half_bytes);
    key.template store<kRotate>(keys, half_bytes, angles);
    value.template store<false>(values, half_bytes, angles);
  }
  if constexpr (kAtOnce > 1) {
    put<T, kElements, kRotate, kAtOnce / 2>(keys, values, count, half_bytes, angles);
  }
}

template <typename T, typename Rotary, int kElements, bool kRotate>
__global__ void __launch_bounds__(kThreads)
    append_kv_kernel(const __grid_constant__ AppendArgs args) {
  constexpr int kBytes = kElements * int{sizeof(T)};
  const AppendKvParams& p = args.p;
  const int32_t row = blockIdx.x * blockDim.z + threadIdx.z;
  if (row >= args.num_rows) return;
  const int32_t pair = blockIdx.y * blockDim.x + threadIdx.x, first = threadIdx.y;
  const int32_t half_bytes = args.half * int{sizeof(T)};
  // Asked for early; needed at the end.
  const int32_t slot = p.slots[row], column = p.columns[row];

  Angles<kElements> angles;
  if constexpr (kRotate) {
    const int32_t i = pair * kElements;
    const Rotary* cos = static_cast<const Rotary*>(p.cos) + row * p.cos_row_stride + i;
    const Rotary* sin = static_cast<const Rotary*>(p.sin) + row * p.sin_row_stride + i;
    load_angles(cos, args.wide_angles, angles.cos1);
    load_angles(sin, args.wide_angles, angles.sin2);
#pragma unroll
    for (int k = 0; k < kElements; ++k) {
      angles.minus_sin1[k] = -angles.sin2[k];
      angles.cos2[k] = angles.cos1[k];
    }
    // With rotary_dim = head_dim / 2 both halves share one set of angles.
    if (p.rotary_dim != args.half) {
      load_angles(cos + args.half, args.wide_angles, angles.cos2);
      load_angles(sin + args.half, args.wide_angles, angles.sin2);
    }
  }

  if (args.num_heads > 0) {
    const int64_t head_bytes = 2 * half_bytes;
    Heads heads{static_cast<const char*>(p.query) + row * p.query_strides.token_stride +
                    first * p.query_strides.head_stride + pair * kBytes,
                blockDim.y * p.query_strides.head_stride,
                static_cast<char*>(p.rotated_query) +
                    (int64_t{row} * args.num_heads + first) * head_bytes + pair * kBytes,
                blockDim.y * head_bytes};
    put<T, kElements, kRotate>(heads, args.num_heads - first, half_bytes, angles);
  }
  if (slot < 0 || slot >= args.num_slots || column < 0 || column >= p.sizes.capacity) return;
  const auto heads = [&](const void* x, const TokenStrides& token, void* cache,
                         const CacheStrides& s) {
    return Heads{static_cast<const char*>(x) + row * token.token_stride +
                     first * token.head_stride + pair * kBytes,
                 blockDim.y * token.head_stride,
                 static_cast<char*>(cache) + slot * s.slot_stride + first * s.head_stride +
                     column * s.column_stride + pair * kBytes,
                 blockDim.y * s.head_stride};
  };
  Heads keys = heads(p.key, p.key_strides, p.key_cache, p.key_cache_strides);
  Heads values = heads(p.value, p.value_strides, p.value_cache, p.value_cache_strides);
  put<T, kElements, kRotate>(keys, values, args.num_kv_heads - first, half_bytes, angles);
}

// Bytes of a chunk that all addresses allow and that fill half a head evenly.
int chunk_bytes(const AppendKvParams& p) {
  ChunkSize size;
  size << p.sizes.head_dim / 2 * size_of(p.dtype) << p.key << p.value << p.query << p.rotated_query
       << p.key_cache << p.value_cache << p.key_strides << p.value_strides << p.query_strides
       << p.key_cache_strides << p.value_cache_strides;
  return size.bytes();
}

struct Shape {
  dim3 grid, block;
};

// How rows, heads and chunk pairs of so many bytes are laid over the device.
Shape shape_of(const AppendArgs& args, int64_t pairs, int64_t bytes) {
  const int64_t heads = std::max(args.num_heads, args.num_kv_heads), rows = args.num_rows;
  int64_t parts = 1, lanes = 1;
  if (rows < kFewRows) {
    // Whole sectors of 32 bytes.
    for (; rows * parts < kFewRows && pairs % 2 == 0 && pairs * bytes >= 64; pairs /= 2) parts *= 2;
  }
  // A warp that has all heads of a row reads its angles once. Copies alone are the cheaper the more
  // heads a thread has, as soon as there are rows enough.
  if (args.p.cos || rows < kFewRows) lanes = std::clamp<int64_t>(kWarp / pairs, 1, heads);
  int64_t block_rows = std::max<int64_t>(kThreads / (pairs * lanes), 1);
  while (block_rows * pairs * lanes > kWarp && block_rows > 1 &&
         divide_up(rows, block_rows) * parts < kWantedBlocks) {
    block_rows /= 2;
  }
  return {dim3(static_cast<unsigned>(divide_up(rows, block_rows)), static_cast<unsigned>(parts)),
          dim3(static_cast<unsigned>(pairs), static_cast<unsigned>(lanes),
               static_cast<unsigned>(block_rows))};
}

template <typename T, typename Rotary, int kElements>
cudaError_t launch_append(const AppendArgs& args, const Shape& shape, cudaStream_t stream) {
  return args.p.cos ? launch(append_kv_kernel<T, Rotary, kElements, true>, shape.grid, shape.block,
                             0, stream, args)
                    : launch(append_kv_kernel<T, T, kElements, false>, shape.grid, shape.block, 0,
                             stream, args);
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& params, cudaStream_t stream) {
  AppendArgs args{};
  AppendKvParams& p = args.p = params;
  if (!p.query) p.num_heads = 0;
  if (p.num_rows == 0 || (p.sizes.num_kv_heads == 0 && p.num_heads == 0)) return cudaSuccess;
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  p.key_strides = in_bytes(p.key_strides, p.dtype);
  p.value_strides = in_bytes(p.value_strides, p.dtype);
  p.query_strides = in_bytes(p.query_strides, p.dtype);
  p.key_cache_strides = in_bytes(p.key_cache_strides, p.dtype);
  p.value_cache_strides = in_bytes(p.value_cache_strides, p.dtype);
  args.num_rows = static_cast<int32_t>(p.num_rows);
  args.num_heads = static_cast<int32_t>(p.num_heads);
  args.num_kv_heads = static_cast<int32_t>(p.sizes.num_kv_heads);
  args.num_slots = static_cast<int32_t>(p.sizes.num_slots);
  args.half = static_cast<int32_t>(p.sizes.head_dim / 2);
  const int64_t rotary_bytes = size_of(p.rotary_dtype);
  ChunkSize angles;
  angles << p.cos << p.sin << p.cos_row_stride * rotary_bytes << p.sin_row_stride * rotary_bytes
         << args.half * rotary_bytes;
  args.wide_angles = angles.bytes() == kMaxChunkBytes;
  const int bytes = chunk_bytes(p);
  const Shape shape = shape_of(args, args.half * size_of(p.dtype) / bytes, bytes);
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    dispatch_int<16, 4, 2>(bytes, [&]<int kBytes>() {
      // A chunk never splits an element.
      if constexpr (kBytes >= int{sizeof(T)}) {
        constexpr int kElements = kBytes / int{sizeof(T)};
        error = p.rotary_dtype == Dtype::kFloat32
                    ? launch_append<T, float, kElements>(args, shape, stream)
                    : launch_append<T, T, kElements>(args, shape, stream);
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
