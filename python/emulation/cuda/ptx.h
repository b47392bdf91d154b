// Emulated twins of csrc/cuda/device/ptx.h: the same names and signatures, the operand layouts of
// the PTX manual written out element by element.
#pragma once

#include "emulation/cuda/cuda_emulation.h"

namespace baton::cuda {

#define EMULATION_SITE __builtin_return_address(0)

// Global and shared memory, one instruction each.

[[gnu::noinline]] EMULATION_UNTRACKED inline uint4 load_16(const void* address) {
  uint4 value;
  emulation::load(&value, address, 16, EMULATION_SITE);
  return value;
}
template <int kOffset = 0>
[[gnu::noinline]] EMULATION_UNTRACKED uint4 load_16_once(const void* address) {
  uint4 value;
  emulation::load(&value, static_cast<const char*>(address) + kOffset, 16, EMULATION_SITE);
  return value;
}
[[gnu::noinline]] EMULATION_UNTRACKED inline uint2 load_8_once(const void* address) {
  uint2 value;
  emulation::load(&value, address, 8, EMULATION_SITE);
  return value;
}
[[gnu::noinline]] EMULATION_UNTRACKED inline uint32_t load_4_once(const void* address) {
  uint32_t value;
  emulation::load(&value, address, 4, EMULATION_SITE);
  return value;
}
[[gnu::noinline]] EMULATION_UNTRACKED inline uint32_t load_4(const void* global) {
  uint32_t value;
  emulation::load(&value, global, 4, EMULATION_SITE);
  return value;
}
[[gnu::noinline]] EMULATION_UNTRACKED inline uint2 load_8(const void* address) {
  uint2 value;
  emulation::load(&value, address, 8, EMULATION_SITE);
  return value;
}
[[gnu::noinline]] EMULATION_UNTRACKED inline void store_16(void* address, uint4 value) {
  emulation::store(address, &value, 16, EMULATION_SITE);
}
[[gnu::noinline]] EMULATION_UNTRACKED inline void store_16(void* address, float4 value) {
  emulation::store(address, &value, 16, EMULATION_SITE);
}
[[gnu::noinline]] EMULATION_UNTRACKED inline void store_16_global(void* address, uint4 value) {
  emulation::store(address, &value, 16, EMULATION_SITE);
}
[[gnu::noinline]] EMULATION_UNTRACKED inline void store_8(void* address, uint2 value) {
  emulation::store(address, &value, 8, EMULATION_SITE);
}

// cp.async: `valid` false fills the target with zeros and reads nothing.

[[gnu::noinline]] EMULATION_UNTRACKED inline void copy_async_16(void* shared, const void* global,
                                                                bool valid = true) {
#if BATON_ARCH >= 800
  emulation::copy_async(shared, global, 16, valid ? 16 : 0, EMULATION_SITE);
#else
  store_16(shared, valid ? load_16(global) : uint4{0, 0, 0, 0});
#endif
}
inline void copy_async_commit() { emulation::copy_async_commit(); }
template <int kGroupsLeft>
void copy_async_wait() {
  emulation::copy_async_wait(kGroupsLeft);
}

// Programmatic dependent launch: a grid behind another starts at once, and what the one before
// wrote may be looked at behind the wait only.

inline void let_next_grid_start() {}
inline void wait_for_grid_before() { emulation::wait_for_grid_before(); }

// ldmatrix: lane 8 k + r gives the address of row r of the k-th 8x8 matrix of 16-bit elements; lane
// 4 r + c receives elements 2 c and 2 c + 1 of row r (of column r when transposed).

namespace twin {

template <int kMatrices>
struct Fragments {
  uint32_t registers[kMatrices];
};

template <int kMatrices, bool kTransposed>
constexpr auto load_matrices = [](emulation::Lane<const void*, Fragments<kMatrices>>* const* lanes,
                                  unsigned) EMULATION_UNTRACKED {
  for (int k = 0; k < kMatrices; ++k) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) std::memcpy(rows[r], lanes[8 * k + r]->in, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = kTransposed ? rows[c][r] : rows[r][c];
      const uint32_t high = kTransposed ? rows[c + 1][r] : rows[r][c + 1];
      lanes[lane]->out.registers[k] = low | high << 16;
    }
  }
};

template <int kMatrices, bool kTransposed>
[[gnu::noinline]] EMULATION_UNTRACKED void load_matrix(uint32_t (&registers)[kMatrices],
                                                       const void* row, emulation::Where where) {
  // Each lane that gives an address reads one row for all.
  if (emulation::lane_id() < 8 * kMatrices) {
    uint4 unused;
    emulation::load(&unused, row, 16, EMULATION_SITE);
  }
  const auto result =
      emulation::exchange<load_matrices<kMatrices, kTransposed>, const void*, Fragments<kMatrices>>(
          ~0u, row, "ldmatrix", where);
  std::memcpy(registers, result.registers, sizeof(registers));
}

}  // namespace twin

template <int kMatrices>
void load_matrix(uint32_t (&registers)[kMatrices], const void* row, EMULATION_WHERE) {
  twin::load_matrix<kMatrices, false>(registers, row, where);
}
template <int kMatrices>
void load_matrix_transposed(uint32_t (&registers)[kMatrices], const void* row, EMULATION_WHERE) {
  twin::load_matrix<kMatrices, true>(registers, row, where);
}

// movmatrix: transposes an 8x8 matrix that lies in the registers as ldmatrix leaves it.

EMULATION_UNTRACKED inline uint32_t transpose_matrix(uint32_t rows, EMULATION_WHERE) {
  constexpr auto combine = [](emulation::Lane<uint32_t, uint32_t>* const* lanes, unsigned)
                               EMULATION_UNTRACKED {
                                 const auto element = [&](int r, int c) {
                                   return lanes[4 * r + c / 2]->in >> 16 * (c % 2) & 0xffffu;
                                 };
                                 for (int lane = 0; lane < 32; ++lane) {
                                   const int r = lane / 4, c = lane % 4 * 2;
                                   lanes[lane]->out = element(c, r) | element(c + 1, r) << 16;
                                 }
                               };
  return emulation::exchange<combine, uint32_t>(~0u, rows, "movmatrix", where);
}

// mma.sync: sums += a b with a [16, kDepth], b [kDepth, 8], sums [16, 8]. With g = lane / 4 and
// t = lane % 4, register i of a holds row g (+ 8 for odd i), columns 2 t, 2 t + 1 (+ 8 for i >= 2);
// register i of b rows 2 t, 2 t + 1 (+ 8 i) of column g; sums columns 2 t, 2 t + 1 of row g, then
// of row g + 8.

namespace twin {

template <int kDepth>
struct MmaOperands {
  float sums[4];
  uint32_t a[kDepth / 4], b[kDepth / 8];
};
struct MmaSums {
  float sums[4];
};

template <typename T>
EMULATION_UNTRACKED float element(uint32_t pair, int i) {
  const uint16_t bits = pair >> 16 * i;
  return static_cast<float>(std::bit_cast<T>(bits));
}

template <typename T, int kDepth>
constexpr auto multiply =
    [](emulation::Lane<MmaOperands<kDepth>, MmaSums>* const* lanes, unsigned) EMULATION_UNTRACKED {
      float a[16][kDepth], b[kDepth][8];
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const auto& in = lanes[lane]->in;
        for (int j = 0; j < 2; ++j) {
          for (int i = 0; i < kDepth / 4; ++i) {
            a[g + i % 2 * 8][2 * t + j + i / 2 * 8] = element<T>(in.a[i], j);
          }
          for (int i = 0; i < kDepth / 8; ++i) b[2 * t + j + 8 * i][g] = element<T>(in.b[i], j);
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
          const int row = g + i / 2 * 8, column = 2 * t + i % 2;
          float sum = lanes[lane]->in.sums[i];
          for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
          lanes[lane]->out.sums[i] = sum;
        }
      }
    };

}  // namespace twin

// T is __half or __nv_bfloat16; kDepth 16, or 8 for __half on sm_75.
template <typename T, int kDepth>
EMULATION_UNTRACKED void mma(float (&sums)[4], const uint32_t (&a)[kDepth / 4],
                             const uint32_t (&b)[kDepth / 8], EMULATION_WHERE) {
  static_assert(kDepth == 16 || kDepth == 8);
  twin::MmaOperands<kDepth> operands;
  std::memcpy(operands.sums, sums, sizeof(sums));
  std::memcpy(operands.a, a, sizeof(a));
  std::memcpy(operands.b, b, sizeof(b));
  const auto result =
      emulation::exchange<twin::multiply<T, kDepth>, twin::MmaOperands<kDepth>, twin::MmaSums>(
          ~0u, operands, "mma", where);
  std::memcpy(sums, result.sums, sizeof(sums));
}

template <int kBits>
EMULATION_UNTRACKED float shuffle_xor(float x, EMULATION_WHERE) {
  return __shfl_xor_sync(~0u, x, kBits, 32, where);
}
template <typename T>
void hide(T&) {}
inline void clear(float& x, float& y) { x = y = 0.0f; }

// Two 16-bit elements of a register, the first one in the low half.
template <typename T>
float2 unpack(uint32_t pair) {
  return {twin::element<T>(pair, 0), twin::element<T>(pair, 1)};
}

// 2^x and the reciprocal, as the special function unit gives them.
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1.0f / x; }

}  // namespace baton::cuda
