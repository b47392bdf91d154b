// Emulated twins of csrc/cuda/device/warpgroup.h: the same names and signatures.
#pragma once

#include "emulation/cuda/cuda_emulation.h"
#include "emulation/cuda/products.h"

namespace baton::cuda {

// Where something is in shared memory.
EMULATION_UNTRACKED inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) -
                               ::emulation::dynamic_shared);
}

inline uint32_t thread_index() { return threadIdx.x; }

inline void init_barrier(uint64_t* barrier, uint32_t count) {
  ::emulation::init_barrier(barrier, count);
}
inline void arrive(uint64_t* barrier) { ::emulation::arrive(barrier); }
inline void wait_for_phase(uint64_t* barrier, uint32_t parity, EMULATION_WHERE) {
  ::emulation::wait_for_phase(barrier, parity, where);
}
inline void fence_products() { ::emulation::fence_proxy(); }

template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}

// The descriptor of an operand in the 128-byte swizzle, field by field as in the PTX manual: bits 0
// to 13 the address, 16 to 29 the leading byte offset, 32 to 45 the stride byte offset, all in 16
// bytes; bits 62 and 63 the swizzle.
inline uint64_t operand_at(uint32_t address, uint32_t panels, uint32_t rows_8) {
  return uint64_t{address >> 4 & 0x3fff} | uint64_t{panels >> 4 & 0x3fff} << 16 |
         uint64_t{rows_8 >> 4 & 0x3fff} << 32 | uint64_t{1} << 62;
}

enum class OperandLayout { kColumns, kRows };

template <typename T, OperandLayout kLayout, bool kAdds>
EMULATION_UNTRACKED void multiply_64(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b,
                                     EMULATION_WHERE) {
  static_assert(sizeof(d) == ::emulation::kProductSums * sizeof(float));
  ::emulation::begin_product(
      &d[0][0], a, {b, kLayout == OperandLayout::kRows, kAdds, std::is_same_v<T, __half>}, where);
}
inline void fence_registers() { ::emulation::fence_registers(); }
inline void commit_products() { ::emulation::commit_products(); }
template <int kGroupsLeft>
void wait_for_products(float (&)[16][4], EMULATION_WHERE) {
  ::emulation::wait_for_products(kGroupsLeft, where);
}

}  // namespace baton::cuda
