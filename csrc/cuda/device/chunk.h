// A chunk is what one thread loads or stores in one instruction: 16 bytes where every address
// allows it, else 4 or 2.
#pragma once

#include "common/cache.h"
#include "cuda/device/device.h"

namespace baton::cuda {

constexpr int kMaxChunkBytes = 16;

// Finds the widest chunk that a set of base addresses, strides and lengths allows.
class ChunkSize {
 public:
  ChunkSize& operator<<(const void* address) {
    bits_ |= reinterpret_cast<uintptr_t>(address);
    return *this;
  }
  ChunkSize& operator<<(int64_t bytes) {
    bits_ |= static_cast<uint64_t>(bytes);
    return *this;
  }
  // 16, 4 or 2: eight bytes would pay too seldom for the kernels that they would add.
  int bytes() const {
    const int widest = static_cast<int>(bits_ & -bits_);
    return widest == 8 ? 4 : widest;
  }

 private:
  uint64_t bits_ = kMaxChunkBytes;
};

template <int kBytes>
struct ChunkType;
template <>
struct ChunkType<16> {
  using type = uint4;
};
template <>
struct ChunkType<4> {
  using type = uint32_t;
};
template <>
struct ChunkType<2> {
  using type = uint16_t;
};
template <int kBytes>
using Chunk = typename ChunkType<kBytes>::type;

// A chunk and the elements it holds.
template <typename T, int kElements>
union Elements {
  static constexpr int kWords = (kElements * int{sizeof(T)} + 3) / 4;
  Chunk<kElements* int{sizeof(T)}> chunk;
  T values[kElements];
  uint32_t words[kWords];
  __device__ __forceinline__ Elements() {}

  // 16-bit elements go two at a time, which takes half of the instructions.
  static constexpr bool kInPairs = sizeof(T) == 2 && kElements % 2 == 0;
  __device__ __forceinline__ void load(float (&x)[kElements]) const {
    if constexpr (kInPairs) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        const float2 pair = unpack<T>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) x[i] = to_float(values[i]);
    }
  }
  __device__ __forceinline__ void store(const float (&x)[kElements]) {
    if constexpr (kInPairs) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = pack<T>(x[2 * i], x[2 * i + 1]);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[i] = from_float<T>(x[i]);
    }
  }
};

// Loads data that is read once per call and would only push other data out of the L1 cache. An
// offset in bytes is part of the instruction.
template <int kBytes, int kOffset = 0>
__device__ __forceinline__ Chunk<kBytes> load_chunk(const char* address) {
  if constexpr (kBytes == 16) {
    return load_16_once<kOffset>(address);
  } else {
    return *reinterpret_cast<const Chunk<kBytes>*>(address + kOffset);
  }
}

template <int kBytes>
__device__ __forceinline__ void store_chunk(void* address, Chunk<kBytes> value) {
  if constexpr (kBytes == 16) {
    store_16(address, value);
  } else {
    *static_cast<Chunk<kBytes>*>(address) = value;
  }
}

// Load and store of one chunk after another, `step` apart, with one addition each.
template <int kBytes, typename Pointer>
__device__ __forceinline__ Chunk<kBytes> load_and_advance(Pointer& address, int64_t step) {
  const Chunk<kBytes> value = load_chunk<kBytes>(address);
  address += step;
  if constexpr (kBytes == 16) hide(address);
  return value;
}
// Where the address has been hidden.
template <int kBytes>
__device__ __forceinline__ void store_hidden(char* address, Chunk<kBytes> value) {
  if constexpr (kBytes == 16) {
    store_16_global(address, value);
  } else {
    store_chunk<kBytes>(address, value);
  }
}
template <int kBytes>
__device__ __forceinline__ void store_and_advance(char*& address, int64_t step,
                                                  Chunk<kBytes> value) {
  store_hidden<kBytes>(address, value);
  address += step;
  if constexpr (kBytes == 16) hide(address);
}

// Strides in bytes.
inline CacheStrides in_bytes(const CacheStrides& s, Dtype dtype) {
  const int64_t n = size_of(dtype);
  return {s.layer_stride * n, s.slot_stride * n, s.head_stride * n, s.column_stride * n};
}
inline TokenStrides in_bytes(const TokenStrides& s, Dtype dtype) {
  const int64_t n = size_of(dtype);
  return {s.layer_stride * n, s.token_stride * n, s.head_stride * n};
}

inline ChunkSize& operator<<(ChunkSize& size, const CacheStrides& s) {
  return size << s.layer_stride << s.slot_stride << s.head_stride << s.column_stride;
}
inline ChunkSize& operator<<(ChunkSize& size, const TokenStrides& s) {
  return size << s.layer_stride << s.token_stride << s.head_stride;
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace baton::cuda
