// Barriers with phases, and the products of warpgroups, as compute capability 9.0 has them. What
// kernels call stands in warpgroup.h.
//
// Products run when all 128 threads have begun them, or as late as allowed: when all have come to
// where they wait for them. They read shared memory just then. Until its wait a thread's sums are
// NaN of one pattern, which nobody may overwrite.
#pragma once

#include <cstdint>

#include "emulation/cuda/runtime.h"

namespace emulation {

// mbarrier. A barrier is known by its address, whose 8 bytes say nothing.
void init_barrier(const void* barrier, unsigned count);
void arrive(const void* barrier);
void wait_for_phase(const void* barrier, unsigned parity, Where where);
// Products may read writes that are known to have happened.
void fence_proxy();

// The operands of a product m64n128k16 that all threads of a warpgroup must give alike.
struct Product {
  uint64_t operand;  // descriptor of b
  bool by_rows;      // a row of memory per row of b, not per column
  bool adds;
  bool of_halves;  // or bfloat16
  bool operator==(const Product&) const = default;
};
constexpr unsigned kWarpgroup = 128;
constexpr int kProductSums = 64, kProductDepth = 16, kProductColumns = 128;

// `sums` and `a` are the running thread's.
void begin_product(float* sums, const uint32_t* a, const Product& product, Where where);
void fence_registers();
void commit_products();
void wait_for_products(unsigned groups_left, Where where);

// The products of a block are forgotten; those of a thread end when it returns.
void forget_products(unsigned num_threads);
void end_products();

}  // namespace emulation
