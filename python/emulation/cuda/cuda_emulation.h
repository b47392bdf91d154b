// Replaces CUDA when the host compiler reads a kernel source: the language's own
// words, warp-wide functions, atomics and fast arithmetic. csrc/cuda/device/device.h includes it.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

// The real types; their host versions round as the device does.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation/cuda/runtime.h"

// 100 times the compute capability that the emulated kernel is compiled for.
#if !defined(BATON_ARCH)
#define BATON_ARCH 900
#endif

namespace emulation {
constexpr bool kHasWarpgroupProducts = BATON_ARCH == 900;
// As compute capability 8.0 has.
constexpr int64_t kMultiprocessorSharedBytes = 164 * 1024;
}  // namespace emulation

#undef __shared__
// One block runs at a time, so one copy serves them all. Races between blocks are not seen in it.
#define __shared__ static
#undef __grid_constant__
#define __grid_constant__
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (::emulation::place.thread)
#define blockIdx (::emulation::place.block)
#define blockDim (::emulation::place.block_size)
#define gridDim (::emulation::place.grid_size)
constexpr int warpSize = 32;

using std::max;
using std::min;

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::block_barrier(where);
}

namespace emulation {

// All lanes' values in, one value per lane out.
template <typename In, typename Out>
struct Lane {
  In in;
  Out out;
};

// Runs combine(lane data by lane, null outside the mask; mask) once per warp.
template <auto kCombine, typename In, typename Out = In>
EMULATION_UNTRACKED Out exchange(unsigned mask, const In& in, const char* name, Where where) {
  Lane<In, Out> lane{in, Out{}};
  warp_operation(
      mask,
      [](void* const* lanes, unsigned m)
          EMULATION_UNTRACKED { kCombine(reinterpret_cast<Lane<In, Out>* const*>(lanes), m); },
      &lane, name, where);
  return lane.out;
}

template <typename T>
struct Shuffled {
  T value;
  int source;  // lane
};

template <typename T>
EMULATION_UNTRACKED T shuffle(unsigned mask, T value, int source, const char* name, Where where) {
  static_assert(sizeof(T) <= 8);
  constexpr auto combine = [](Lane<Shuffled<T>, T>* const* lanes, unsigned m) EMULATION_UNTRACKED {
    for (unsigned rest = m; rest; rest &= rest - 1) {
      Lane<Shuffled<T>, T>* lane = lanes[std::countr_zero(rest)];
      Lane<Shuffled<T>, T>* source = lanes[lane->in.source];
      if (!source)
        fail("shuffle reads lane " + std::to_string(lane->in.source) + ", not in its mask");
      lane->out = source->in.value;
    }
  };
  return exchange<combine, Shuffled<T>, T>(mask, {value, source}, name, where);
}

inline int lane_id() { return static_cast<int>(place.lane); }

// Votes: the ballot of the predicate's lanes goes to all.
EMULATION_UNTRACKED inline unsigned ballot(unsigned mask, bool predicate, const char* name,
                                           Where where) {
  constexpr auto combine = [](Lane<bool, unsigned>* const* lanes, unsigned m) EMULATION_UNTRACKED {
    unsigned result = 0;
    for (unsigned rest = m; rest; rest &= rest - 1) {
      const int lane = std::countr_zero(rest);
      if (lanes[lane]->in) result |= 1u << lane;
    }
    for (unsigned rest = m; rest; rest &= rest - 1) lanes[std::countr_zero(rest)]->out = result;
  };
  return exchange<combine, bool, unsigned>(mask, predicate, name, where);
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = ~0u, emulation::Where where = emulation::Where::current()) {
  emulation::warp_operation(
      mask, [](void* const*, unsigned) {}, nullptr, "__syncwarp", where, true);
}

#define EMULATION_WHERE emulation::Where where = emulation::Where::current()

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMULATION_WHERE) {
  const int lane = emulation::lane_id();
  return emulation::shuffle(mask, value, (lane & -width) | (source & (width - 1)), "__shfl_sync",
                            where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATION_WHERE) {
  const int lane = emulation::lane_id(), source = lane ^ lane_mask;
  return emulation::shuffle(mask, value, source < (lane & -width) + width ? source : lane,
                            "__shfl_xor_sync", where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_WHERE) {
  const int lane = emulation::lane_id(), source = lane + static_cast<int>(delta);
  return emulation::shuffle(mask, value, source < (lane & -width) + width ? source : lane,
                            "__shfl_down_sync", where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMULATION_WHERE) {
  const int lane = emulation::lane_id(), source = lane - static_cast<int>(delta);
  return emulation::shuffle(mask, value, source >= (lane & -width) ? source : lane,
                            "__shfl_up_sync", where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMULATION_WHERE) {
  return emulation::ballot(mask, predicate != 0, "__ballot_sync", where);
}
inline int __any_sync(unsigned mask, int predicate, EMULATION_WHERE) {
  return emulation::ballot(mask, predicate != 0, "__any_sync", where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, EMULATION_WHERE) {
  return emulation::ballot(mask, predicate != 0, "__all_sync", where) == mask;
}

// Atomics. One fiber runs at a time, so plain arithmetic does; the judge is told.

namespace emulation {
template <typename T, typename Fn>
[[gnu::noinline]] EMULATION_UNTRACKED T atomic_update(T* address, Fn update) {
  announce_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = update(old);
  return old;
}
}  // namespace emulation

template <typename T>
T atomicAdd(T* address, T value) {
  return emulation::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulation::atomic_update(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulation::atomic_update(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, T value) {
  return emulation::atomic_update(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return emulation::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulation::atomic_update(address,
                                  [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}
inline void __trap() { emulation::fail("__trap"); }
inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() {}

// Memory and bits.

template <typename T>
[[gnu::noinline]] EMULATION_UNTRACKED T __ldg(const T* address) {
  T value;
  emulation::load(&value, address, sizeof(T), __builtin_return_address(0));
  return value;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = x | uint64_t{y} << 32;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }

// Arithmetic. The fast device versions differ from these in the last bits.

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// Dynamic shared memory of the block, as in `extern __shared__`.
#define EMULATION_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::dynamic_shared

#include "emulation/cuda/ptx.h"
