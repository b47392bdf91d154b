// AMX tile instructions in software: palette 1 and TDPBF16PS as Intel's manual defines them, for
// kernels compiled with -DBATON_EMULATE_AMX on a CPU without AMX (csrc/cpu/amx.h).
//
// What would end a process in an exception (#GP, #UD) is kept as a fault, which the tests ask for.
// Every thread has tiles of its own; instructions are counted over all threads.
#pragma once

#include <cstdint>

namespace emulation {

void tile_configure(const void* config);
void tile_release();
void tile_zero(int tile);
void tile_load(int tile, const void* rows, int64_t stride);
void tile_store(int tile, void* rows, int64_t stride);
// sum += a b: for each element two chains of fused multiply-adds from 0, one over the even and one
// over the odd elements of the pairs; their sum is added to the element. Round to nearest even;
// denormal inputs count as 0 and denormal results become 0.
void tile_multiply(int sum, int a, int b);

}  // namespace emulation
