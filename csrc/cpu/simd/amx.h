// AMX tile instructions as functions; no other file knows them. On CPUs without AMX, tests run them
// all the same: python/emulation/amx/amx.cpp executes in software what the CPU refuses.
//
// There are eight tiles of at most 16 rows of 64 bytes. A thread must configure their shapes before
// the first use and release them after the last: TileScope does both.
#pragma once

#include "cpu/simd/simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define BATON_HAS_TILES

namespace baton::cpu::BATON_ISA {

constexpr int kAmxRows = 16;      // rows of a tile, and columns of float32 or of bfloat16 pairs
constexpr int kAmxStep = 32;      // bfloat16 elements in a row
constexpr int kAmxRowBytes = 64;  // bytes in a row

// The memory that ldtilecfg reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};  // of tile i; the last eight are reserved
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

// Assembly instead of the compiler's intrinsics: GCC's accept only literal tile numbers, and its
// tile load does not tell the optimizer that memory is read.
BATON_INLINE void tile_configure(const TileConfig& config) {
  asm volatile("ldtilecfg %0" : : "m"(config));
}

BATON_INLINE void tile_release() { asm volatile("tilerelease"); }

template <int kTile>
BATON_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}

// Loads the tile's configured rows, `stride` bytes apart; they need no alignment.
template <int kTile>
BATON_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

template <int kTile>
BATON_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
}

// sum[m][n] += sum over pairs k of a[m][k] . b[k][n]: pairs of bfloat16, float32 sums. Element
// (m, n) depends only on row m of a and column n of b, in one order for every tile shape.
template <int kSum, int kA, int kB>
BATON_INLINE void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// The same for int8, with four elements in place of a pair and int32 sums, so exact.
template <int kSum, int kA, int kB>
BATON_INLINE void tile_multiply_bytes() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
}

// The tiles that a kernel call uses on this thread: 0 to 3 hold sums, 4 and 5 rows of the first
// operand, 6 and 7 pairs of the second, which has `columns` columns.
class TileScope {
 public:
  explicit TileScope(int columns) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = kAmxRows;
      config.row_bytes[tile] =
          tile == 4 || tile == 5 ? kAmxRowBytes : static_cast<uint16_t>(4 * columns);
    }
    tile_configure(config);
  }
  // If tiles stayed configured, every thread switch would save them.
  ~TileScope() { tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace baton::cpu::BATON_ISA

#endif
