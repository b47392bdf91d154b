// What compute capability 9.0 has for warpgroups (four warps, beginning at a multiple of four):
// products whose second operand lies in shared memory, barriers with phases, and the proxy fence
// between the two. As in ptx.h each function has a twin, in python/emulation/cuda/warpgroup.h.
// Compiled for sm_90a only.
#pragma once

#include "cuda/device/device.h"

#if !defined(__CUDACC__)
#include "emulation/cuda/warpgroup.h"
#else

namespace baton::cuda {

// threadIdx.x of a block with one dimension, read anew: what the compiler reads once it keeps.
__device__ __forceinline__ uint32_t thread_index() {
  uint32_t index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

// mbarrier: 8 bytes of shared memory. A phase ends when `count` arrivals have come; the next one
// begins at once. Arriving releases what the thread has done, seeing a phase's end acquires it.

__device__ __forceinline__ void init_barrier(uint64_t* barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Until the phase of this parity has ended: the first phase has parity 0, and the one before it,
// which never was, counts as ended.
__device__ __forceinline__ void wait_for_phase(uint64_t* barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!ended);
}

// Between writing shared memory and a product that reads it: products are of another proxy.
__device__ __forceinline__ void fence_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// How many registers each thread of the warpgroup has from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Where a product finds its second operand: rows of 128 bytes in the 128-byte swizzle, which has
// the 16-byte chunk c of row r of every eight in the place of chunk c ^ r. `address` begins at a
// multiple of 1024 or within a row; `rows_8` is the distance of one eight of rows from the next.
// Where rows lie along the depth of the product, `panels` is the distance of one 64 columns from
// the next; else it is not used. Descriptors of one operand differ only by their address, which
// stands in their lowest bits, in 16 bytes.
__device__ __forceinline__ uint64_t operand_at(uint32_t address, uint32_t panels, uint32_t rows_8) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | uint64_t{rows_8 / 16} << 32 | (panels / 16) << 16 | address / 16;
}

// Products of a warpgroup: sums += a b with a [64, 16] in registers, b [16, 128] in shared memory,
// sums [64, 128]. Warp w of the four has rows 16 w to 16 w + 15; in a warp registers of a and of
// sums lie as those of m16n8k16 do (ptx.h), sums[n] for columns 8 n to 8 n + 7. kOperand says how b
// lies: kColumns, a row of memory per column of b (the depth is contiguous), or kRows, a row of
// memory per row of b. With kAdds false sums begin at zero.
//
// They run on their own until they are waited for: nobody may look at sums before, and before the
// first of a chain what was done to registers has to be fenced.
enum class OperandLayout { kColumns, kRows };

// Numbers of 64 accumulators in a statement of assembly, and the variables that they stand for.
#define BATON_SUMS_64                                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"
#define BATON_SUMS_4(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define BATON_ALL_SUMS                                                                          \
  BATON_SUMS_4(0), BATON_SUMS_4(1), BATON_SUMS_4(2), BATON_SUMS_4(3), BATON_SUMS_4(4),          \
      BATON_SUMS_4(5), BATON_SUMS_4(6), BATON_SUMS_4(7), BATON_SUMS_4(8), BATON_SUMS_4(9),      \
      BATON_SUMS_4(10), BATON_SUMS_4(11), BATON_SUMS_4(12), BATON_SUMS_4(13), BATON_SUMS_4(14), \
      BATON_SUMS_4(15)
#define BATON_PRODUCT(type, transposed)                                              \
  asm volatile(                                                                      \
      "{\n"                                                                          \
      ".reg .pred adds;\n"                                                           \
      "setp.ne.b32 adds, %69, 0;\n"                                                  \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " " BATON_SUMS_64 \
      ", {%64, %65, %66, %67}, %68, adds, 1, 1, " transposed                         \
      ";\n"                                                                          \
      "}"                                                                            \
      : BATON_ALL_SUMS                                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdds ? 1 : 0))

template <typename T, OperandLayout kLayout, bool kAdds>
__device__ __forceinline__ void multiply_64(float (&d)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<T, __half>) {
    if constexpr (kLayout == OperandLayout::kColumns) {
      BATON_PRODUCT("f16", "0");
    } else {
      BATON_PRODUCT("f16", "1");
    }
  } else {
    if constexpr (kLayout == OperandLayout::kColumns) {
      BATON_PRODUCT("bf16", "0");
    } else {
      BATON_PRODUCT("bf16", "1");
    }
  }
}

// Orders earlier accesses of registers before the products that follow.
__device__ __forceinline__ void fence_registers() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most this many of the groups committed last are in flight. Their sums are what d
// has from here on: the compiler must not take it that it had them before.
template <int kGroupsLeft>
__device__ __forceinline__ void wait_for_products(float (&d)[16][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %64;" : BATON_ALL_SUMS : "n"(kGroupsLeft) : "memory");
}

#undef BATON_PRODUCT
#undef BATON_ALL_SUMS
#undef BATON_SUMS_4
#undef BATON_SUMS_64

}  // namespace baton::cuda

#endif
