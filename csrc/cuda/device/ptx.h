// Single PTX instructions as functions. Everything a kernel writes in assembly stands here, and
// each function has a twin in python/emulation/cuda/ptx.h, where a host compiler finds it.
#pragma once

#if !defined(__CUDACC__)
#include "emulation/cuda/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace baton::cuda {

// Global and shared memory, one instruction each. The address is aligned to the size.

__device__ __forceinline__ uint4 load_16(const void* address) {
  return *static_cast<const uint4*>(address);
}
// Loads data that is not read again, without a place in the L1 cache. The offset is part of the
// instruction.
template <int kOffset = 0>
__device__ __forceinline__ uint4 load_16_once(const void* address) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4+%5];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(address), "n"(kOffset)
               : "memory");
  return value;
}
__device__ __forceinline__ uint2 load_8_once(const void* address) {
  uint2 value;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(value.x), "=r"(value.y)
               : "l"(address)
               : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_4_once(const void* address) {
  uint32_t value;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_4(const void* global) {
  uint32_t value;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
  return value;
}
__device__ __forceinline__ uint2 load_8(const void* address) {
  return *static_cast<const uint2*>(address);
}
__device__ __forceinline__ void store_16(void* address, uint4 value) {
  *static_cast<uint4*>(address) = value;
}
__device__ __forceinline__ void store_16(void* address, float4 value) {
  *static_cast<float4*>(address) = value;
}
// For addresses of global memory that the compiler does not recognize as such.
__device__ __forceinline__ void store_16_global(void* address, uint4 value) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}
__device__ __forceinline__ void store_8(void* address, uint2 value) {
  *static_cast<uint2*>(address) = value;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// cp.async: `valid` false fills the target with zeros and reads nothing. sm_75 has no such copy and
// goes through registers, at once.

__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  store_16(shared, valid ? load_16(global) : uint4{0, 0, 0, 0});
#endif
}
__device__ __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#endif
}

// Programmatic dependent launch (launch_behind of device.h): a kernel may start before the one that
// it was launched behind has ended. Below sm_90 it does not, and neither of these does anything.

// Once all blocks have come here, or ended, those of the kernel behind may start.
__device__ __forceinline__ void let_next_grid_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Waits until the kernel before has ended and all that it wrote can be read. Every thread of a
// kernel that is launched behind another comes here before it ends: a grid's end then stands for
// those of all grids before it.
__device__ __forceinline__ void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ldmatrix: lane 8 k + r gives the address of row r of the k-th 8x8 matrix of 16-bit elements; lane
// 4 r + c receives elements 2 c and 2 c + 1 of row r (of column r when transposed).

template <int kMatrices>
__device__ __forceinline__ void load_matrix(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}
template <int kMatrices>
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  const uint32_t address = shared_address(row);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
}

// movmatrix: transposes an 8x8 matrix that lies in the registers as ldmatrix leaves it.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t rows) {
  uint32_t columns;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(columns) : "r"(rows));
  return columns;
}

// mma.sync: sums += a b with a [16, kDepth], b [kDepth, 8], sums [16, 8]. With g = lane / 4 and
// t = lane % 4, register i of a holds row g (+ 8 for odd i), columns 2 t, 2 t + 1 (+ 8 for i >= 2);
// register i of b rows 2 t, 2 t + 1 (+ 8 i) of column g; sums columns 2 t, 2 t + 1 of row g, then
// of row g + 8. T is __half or __nv_bfloat16; kDepth 16, or 8 for __half on sm_75.
template <typename T, int kDepth>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[kDepth / 4],
                                    const uint32_t (&b)[kDepth / 8]) {
  static_assert(kDepth == 16 || (kDepth == 8 && std::is_same_v<T, __half>));
  if constexpr (kDepth == 8) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  } else if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// The value of the lane whose number differs in these bits; all lanes take part. Float registers
// stay float registers, which spares moves where the compiler does not see through a cast.
template <int kBits>
__device__ __forceinline__ float shuffle_xor(float x) {
  float y;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, -1;" : "=f"(y) : "f"(x), "n"(kBits));
  return y;
}

// Makes a number or an address something that the compiler knows nothing about. Otherwise nvcc
// turns a chain of additions into products with constants and derives loop counters anew from what
// they were made of, which costs more instructions and registers than it saves.
__device__ __forceinline__ void hide(int32_t& x) { asm volatile("" : "+r"(x)); }
template <typename T>
__device__ __forceinline__ void hide(T*& x) {
  asm volatile("" : "+l"(x));
}

// Zeros for a pair of registers, which stay where they are.
__device__ __forceinline__ void clear(float& x, float& y) {
  asm volatile("mov.b64 {%0, %1}, 0;" : "=f"(x), "=f"(y));
}

// Two 16-bit elements of a register, the first one in the low half. bfloat16 is the upper half of a
// float. T is __half or __nv_bfloat16.
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  float2 x;
  if constexpr (std::is_same_v<T, __half>) {
    asm("{\n"
        ".reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\n"
        "cvt.f32.f16 %1, high;\n"
        "}"
        : "=f"(x.x), "=f"(x.y)
        : "r"(pair));
  } else {
    asm("shl.b32 %0, %1, 16;" : "=f"(x.x) : "r"(pair));
    asm("and.b32 %0, %1, 0xffff0000;" : "=f"(x.y) : "r"(pair));
  }
  return x;
}

// 2^x and the reciprocal, as the special function unit gives them.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace baton::cuda

#endif
