// append_kv: rotate one token per row (optional), write its key and value into its column.
//   x1 = x[: d / 2], x2 = x[d / 2 :];  rotated = [x1 cos - x2 sin, x2 cos + x1 sin]
//
// A thread has a pair of chunks of one row: elements [i, i + n) of x1 and of x2, n filling 16
// bytes. It walks over heads of the queries, then of keys and values together, so that finding the
// row's place and loading its angles is paid once for all of them. With angles, a block has one row
// and about one warp: the threads of a pair share the heads, and a row's angles are read once. When
// there are few rows, several blocks have a part of the pairs each. Without angles, a thread has
// all heads of a row, and a block several rows.
//   threadIdx  x: chunk pair, y: first head (with angles) or row
//   blockIdx   x: rows, y: part of the pairs
#include <algorithm>

#include "cuda/device/chunk.h"
#include "cuda/kernels.h"

namespace baton::cuda {

namespace {

constexpr int kThreads = 128, kWarp = 32;
// Query heads whose loads are in flight together, and twice the heads of keys and values: 16
// chunks, or 8 that then wait for their rotation in float, are what the registers of four or more
// blocks per SM hold.
constexpr int kHeadsAtOnce = 8, kRotatedHeadsAtOnce = 4;
// Fewer rows than this leave most SMs of a large device without a warp, so each row gets several.
constexpr int64_t kFewRows = 64;

// How many angles a row has: none, head_dim / 2 for both halves, or head_dim.
enum class Angles { kNone, kHalf, kFull };

// Tensors of one token per row, and caches; in bytes. A step is the distance between the heads
// that one thread walks over.
struct TokenHeads {
  const char* data;
  int64_t row_stride, head_stride, step;
};
struct CacheHeads {
  char* data;
  int64_t slot_stride, head_stride, column_stride, step;
};

struct AppendArgs {
  TokenHeads key, value, query;
  CacheHeads key_cache, value_cache;
  char* rotated_query;
  const int32_t* slots;
  const int32_t* columns;
  const void* cos;
  const void* sin;
  int64_t cos_row_stride, sin_row_stride;
  int64_t capacity;
  int32_t num_rows, num_heads, num_kv_heads, num_slots;
  int32_t half;      // elements of half a head
  bool wide_angles;  // rows of cos and sin, and their second halves, begin at multiples of 16 bytes
};

// The angles of one chunk pair.
template <int kElements>
struct PairAngles {
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

// Whether a warp that has all heads of a row exchanges the row's angles: two chunks of float angles
// for each of 16-bit elements, and four threads to a pair. Each loads one chunk of its pair's, so
// that no sector is requested twice.
template <typename Rotary, int kElements, Angles kAngles, int kHeadDim>
constexpr bool kExchangesAngles =
    kAngles == Angles::kHalf && kHeadDim / 2 / kElements * 4 == kWarp &&
    kElements * sizeof(Rotary) == 2 * kMaxChunkBytes;
constexpr std::size_t kExchangeBytes = kWarp * kMaxChunkBytes;

template <typename Rotary, int kElements>
__device__ __forceinline__ void exchange_angles(const AppendArgs& a, int32_t row, void* shared,
                                                float (&cos)[kElements], float (&sin)[kElements]) {
  const int32_t pair = threadIdx.x, part = threadIdx.y;
  const bool is_sin = part >= 2;
  const auto* angles = static_cast<const Rotary*>(is_sin ? a.sin : a.cos) +
                       row * (is_sin ? a.sin_row_stride : a.cos_row_stride);
  // [part][pair]
  uint4* chunks = static_cast<uint4*>(shared) + pair;
  store_16(chunks + part * (kWarp / 4), load_16(angles + (2 * pair + part % 2) * (kElements / 2)));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Elements<Rotary, kElements / 2> chunk;
    chunk.chunk = load_16(chunks + i * (kWarp / 4));
#pragma unroll
    for (int k = 0; k < kElements / 2; ++k) {
      (i < 2 ? cos : sin)[i % 2 * (kElements / 2) + k] = to_float(chunk.values[k]);
    }
  }
}

// Written out as in the CPU kernel, so that the bits are the same.
template <Angles kAngles, typename T, int kElements>
__device__ __forceinline__ void rotate(Elements<T, kElements>& x1, Elements<T, kElements>& x2,
                                       const PairAngles<kElements>& angles) {
  const auto& cos2 = kAngles == Angles::kFull ? angles.cos2 : angles.cos1;
  float a[kElements], b[kElements];
  x1.load(a);
  x2.load(b);
#pragma unroll
  for (int k = 0; k < kElements; ++k) {
    const float rotated = fmaf(a[k], angles.cos1[k], __fmul_rn(b[k], angles.minus_sin1[k]));
    b[k] = fmaf(b[k], cos2[k], __fmul_rn(a[k], angles.sin2[k]));
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

// The chunk pairs of kCount heads, in registers. kHalf: elements of half a head, or 0 when only
// half_bytes says so.
template <typename T, int kElements, int kHalf, int kCount>
class Pairs {
  static constexpr int kBytes = kElements * int{sizeof(T)};
  Elements<T, kElements> x1_[kCount], x2_[kCount];

 public:
  __device__ __forceinline__ void load(Heads& heads, int32_t half_bytes) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      x1_[h].chunk = load_chunk<kBytes>(heads.source);
      if constexpr (kHalf > 0) {
        x2_[h].chunk = load_chunk<kBytes, kHalf* int{sizeof(T)}>(heads.source);
      } else {
        x2_[h].chunk = load_chunk<kBytes>(heads.source + half_bytes);
      }
      heads.source += heads.source_step;
    }
  }
  template <Angles kAngles>
  __device__ __forceinline__ void store(Heads& heads, int32_t half_bytes,
                                        const PairAngles<kElements>& angles) {
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      if constexpr (kAngles != Angles::kNone) rotate<kAngles>(x1_[h], x2_[h], angles);
      store_chunk<kBytes>(heads.target, x1_[h].chunk);
      store_chunk<kBytes>(heads.target + half_bytes, x2_[h].chunk);
      heads.target += heads.target_step;
    }
  }
};

// Walks over every `step`-th of `count` heads; all loads of kAtOnce come before the first store.
template <typename T, int kElements, Angles kAngles, int kHalf, int kAtOnce>
__device__ __forceinline__ void put(Heads& heads, int32_t count, int32_t step, int32_t half_bytes,
                                    const PairAngles<kElements>& angles) {
#pragma unroll 1
  for (; count > (kAtOnce - 1) * step; count -= kAtOnce * step) {
    Pairs<T, kElements, kHalf, kAtOnce> x;
    x.load(heads, half_bytes);
    x.template store<kAngles>(heads, half_bytes, angles);
  }
  if constexpr (kAtOnce > 1) {
    if (count <= 0) return;
    put<T, kElements, kAngles, kHalf, kAtOnce / 2>(heads, count, step, half_bytes, angles);
  }
}

// Like put(), for keys and values together.
template <typename T, int kElements, Angles kAngles, int kHalf, int kAtOnce>
__device__ __forceinline__ void put_both(Heads& keys, Heads& values, int32_t count, int32_t step,
                                         int32_t half_bytes, const PairAngles<kElements>& angles) {
#pragma unroll 1
  for (; count > (kAtOnce - 1) * step; count -= kAtOnce * step) {
    Pairs<T, kElements, kHalf, kAtOnce> key, value;
    key.load(keys, half_bytes);
    value.load(values, half_bytes);
    key.template store<kAngles>(keys, half_bytes, angles);
    value.template store<Angles::kNone>(values, half_bytes, angles);
  }
  if constexpr (kAtOnce > 1) {
    if (count <= 0) return;
    put_both<T, kElements, kAngles, kHalf, kAtOnce / 2>(keys, values, count, step, half_bytes,
                                                        angles);
  }
}

// kHeadDim > 0 is known at compile time, so that the distances to the second half and between heads
// of the rotated query are parts of the instructions; 0 stands for any.
template <typename T, typename Rotary, int kElements, Angles kAngles, int kHeadDim>
__global__ void __launch_bounds__(kThreads) append_kv_kernel(const __grid_constant__ AppendArgs a) {
  constexpr bool kRotate = kAngles != Angles::kNone, kFixed = kHeadDim > 0;
  constexpr int kBytes = kElements * int{sizeof(T)}, kHalf = kHeadDim / 2;
  constexpr int kAtOnce = kRotate ? kRotatedHeadsAtOnce : kHeadsAtOnce;
  const int32_t row = kRotate ? blockIdx.x : blockIdx.x * blockDim.y + threadIdx.y;
  // Ends threads past the last row; their 32-bit number may have wrapped around.
  if (!kRotate && unsigned(row) >= unsigned(a.num_rows)) return;
  const int32_t first = kRotate ? threadIdx.y : 0;
  int32_t pair = threadIdx.x, step = 1, half = kHalf;
  if constexpr (!kFixed) {
    pair += blockIdx.y * blockDim.x;
    half = a.half;
    if (kRotate) step = blockDim.y;
  } else if constexpr (kRotate) {
    step = kWarp / (kHalf / kElements);
  }
  const int32_t half_bytes = half * int{sizeof(T)};
  // Loaded early; needed at the end.
  const auto slot = static_cast<int32_t>(load_4(a.slots + row));
  const auto column = static_cast<int32_t>(load_4(a.columns + row));

  PairAngles<kElements> angles;
  if constexpr (kRotate) {
    const int32_t i = pair * kElements;
    const Rotary* cos = static_cast<const Rotary*>(a.cos) + row * a.cos_row_stride + i;
    const Rotary* sin = static_cast<const Rotary*>(a.sin) + row * a.sin_row_stride + i;
    const bool wide = kFixed || a.wide_angles;
    if constexpr (kExchangesAngles<Rotary, kElements, kAngles, kHeadDim>) {
      BATON_DYNAMIC_SHARED(memory);
      exchange_angles<Rotary>(a, row, memory, angles.cos1, angles.sin2);
    } else {
      load_angles(cos, wide, angles.cos1);
      load_angles(sin, wide, angles.sin2);
    }
#pragma unroll
    for (int k = 0; k < kElements; ++k) angles.minus_sin1[k] = -angles.sin2[k];
    if constexpr (kAngles == Angles::kFull) {
      load_angles(cos + half, wide, angles.cos2);
      load_angles(sin + half, wide, angles.sin2);
    }
  }
  const auto source = [&](const TokenHeads& x) {
    return x.data + row * x.row_stride + first * x.head_stride + pair * kBytes;
  };
  const int32_t head_bytes = 2 * half_bytes;
  Heads queries{source(a.query), a.query.step,
                a.rotated_query + (int64_t{row} * a.num_heads + first) * head_bytes + pair * kBytes,
                int64_t{step} * head_bytes};
  put<T, kElements, kAngles, kHalf, kAtOnce>(queries, a.num_heads - first, step, half_bytes,
                                             angles);
  if (slot < 0 || slot >= a.num_slots || column < 0 || column >= a.capacity) return;
  const auto heads = [&](const TokenHeads& x, const CacheHeads& cache) {
    return Heads{source(x), x.step,
                 cache.data + slot * cache.slot_stride + first * cache.head_stride +
                     column * cache.column_stride + pair * kBytes,
                 cache.step};
  };
  Heads keys = heads(a.key, a.key_cache), values = heads(a.value, a.value_cache);
  put_both<T, kElements, kAngles, kHalf, kAtOnce / 2>(keys, values, a.num_kv_heads - first, step,
                                                      half_bytes, angles);
}

// Bytes of the largest chunk that all addresses allow and that fills half a head evenly.
int chunk_bytes(const AppendKvParams& p) {
  ChunkSize size;
  size << p.sizes.head_dim / 2 * size_of(p.dtype) << p.key << p.value << p.query << p.rotated_query
       << p.key_cache << p.value_cache << in_bytes(p.key_strides, p.dtype)
       << in_bytes(p.value_strides, p.dtype) << in_bytes(p.query_strides, p.dtype)
       << in_bytes(p.key_cache_strides, p.dtype) << in_bytes(p.value_cache_strides, p.dtype);
  return size.bytes();
}

struct Shape {
  dim3 grid, block;
};

// How rows, heads and chunk pairs of `bytes` bytes are laid over the device.
Shape shape_of(const AppendKvParams& p, int64_t pairs, int64_t bytes) {
  const int64_t heads = std::max(p.num_heads, p.sizes.num_kv_heads);
  int64_t parts = 1, rows = 1, threads = 1;
  // Parts are whole sectors of 32 bytes.
  for (; p.num_rows * parts < kFewRows && pairs % 2 == 0 && pairs * bytes >= 64; pairs /= 2) {
    parts *= 2;
  }
  if (p.cos) {
    threads = std::clamp<int64_t>(kWarp / pairs, 1, heads);
  } else {
    threads = rows =
        std::max<int64_t>((p.num_rows < kFewRows * kWarp ? kWarp : kThreads) / pairs, 1);
  }
  return {dim3(static_cast<unsigned>(divide_up(p.num_rows, rows)), static_cast<unsigned>(parts)),
          dim3(static_cast<unsigned>(pairs), static_cast<unsigned>(threads))};
}

template <typename T, typename Rotary, int kElements, Angles kAngles>
cudaError_t launch_append(const AppendArgs& args, const Shape& shape, cudaStream_t stream) {
  // The most frequent shape, with groups of heads that fill a warp, has a kernel of fixed head_dim.
  constexpr int kHeadDim = 128, kPairs = kHeadDim / 2 / kElements;
  if constexpr (kAngles == Angles::kHalf && kPairs < kWarp) {
    if (2 * args.half == kHeadDim && args.wide_angles && shape.block.x == kPairs &&
        shape.block.y == kWarp / kPairs) {
      const std::size_t shared =
          kExchangesAngles<Rotary, kElements, kAngles, kHeadDim> ? kExchangeBytes : 0;
      return launch(append_kv_kernel<T, Rotary, kElements, kAngles, kHeadDim>, shape.grid,
                    shape.block, shared, stream, args);
    }
  }
  return launch(append_kv_kernel<T, Rotary, kElements, kAngles, 0>, shape.grid, shape.block, 0,
                stream, args);
}

}  // namespace

cudaError_t append_kv(const AppendKvParams& p, cudaStream_t stream) {
  const int64_t num_heads = p.query ? p.num_heads : 0, num_kv_heads = p.sizes.num_kv_heads;
  if (p.num_rows == 0 || num_heads + num_kv_heads == 0) return cudaSuccess;
  if (p.num_rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  const int bytes = chunk_bytes(p);
  const int64_t half = p.sizes.head_dim / 2, rotary_bytes = size_of(p.rotary_dtype);
  const Shape shape = shape_of(p, half * size_of(p.dtype) / bytes, bytes);
  const int64_t step = p.cos ? shape.block.y : 1;
  const auto tokens = [&](const void* x, const TokenStrides& strides) {
    const TokenStrides s = in_bytes(strides, p.dtype);
    return TokenHeads{static_cast<const char*>(x), s.token_stride, s.head_stride,
                      step * s.head_stride};
  };
  const auto cache = [&](void* x, const CacheStrides& strides) {
    const CacheStrides s = in_bytes(strides, p.dtype);
    return CacheHeads{static_cast<char*>(x), s.slot_stride, s.head_stride, s.column_stride,
                      step * s.head_stride};
  };
  ChunkSize angles;
  angles << p.cos << p.sin << p.cos_row_stride * rotary_bytes << p.sin_row_stride * rotary_bytes
         << half * rotary_bytes;
  const AppendArgs args{.key = tokens(p.key, p.key_strides),
                        .value = tokens(p.value, p.value_strides),
                        .query = tokens(p.query, p.query_strides),
                        .key_cache = cache(p.key_cache, p.key_cache_strides),
                        .value_cache = cache(p.value_cache, p.value_cache_strides),
                        .rotated_query = static_cast<char*>(p.rotated_query),
                        .slots = p.slots,
                        .columns = p.columns,
                        .cos = p.cos,
                        .sin = p.sin,
                        .cos_row_stride = p.cos_row_stride,
                        .sin_row_stride = p.sin_row_stride,
                        .capacity = p.sizes.capacity,
                        .num_rows = static_cast<int32_t>(p.num_rows),
                        .num_heads = static_cast<int32_t>(num_heads),
                        .num_kv_heads = static_cast<int32_t>(num_kv_heads),
                        .num_slots = static_cast<int32_t>(p.sizes.num_slots),
                        .half = static_cast<int32_t>(half),
                        .wide_angles = angles.bytes() == kMaxChunkBytes};
  cudaError_t error = cudaErrorInvalidValue;
  dispatch_dtype(p.dtype, [&]<typename Storage>() {
    using T = device_t<Storage>;
    dispatch_int<16, 4, 2>(bytes, [&]<int kBytes>() {
      // A chunk never splits an element.
      if constexpr (kBytes >= int{sizeof(T)}) {
        constexpr int kElements = kBytes / int{sizeof(T)};
        const auto with = [&]<typename Rotary>() {
          error = p.rotary_dim == half
                      ? launch_append<T, Rotary, kElements, Angles::kHalf>(args, shape, stream)
                      : launch_append<T, Rotary, kElements, Angles::kFull>(args, shape, stream);
        };
        if (!p.cos) {
          error = launch_append<T, T, kElements, Angles::kNone>(args, shape, stream);
        } else if (p.rotary_dtype == Dtype::kFloat32) {
          with.template operator()<float>();
        } else {
          with.template operator()<T>();
        }
      }
    });
  });
  return error;
}

}  // namespace baton::cuda
