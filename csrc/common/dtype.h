// Element types of the kernels and the mapping from a run-time dtype to a compile-time type.
//
// Functions in csrc/common are `static`, or templates over a kernel's own lambda: they are compiled
// for several instruction sets, and of a shared symbol the linker could keep the AVX-512 copy for
// the baseline too.
#pragma once

#include <cstdint>

namespace baton {

// The last two occur in caches only: eight-bit elements that share a scale (kv_scales.h).
enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8 };

// Storage only: kernels convert to float before they compute.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Int8 {
  int8_t bits;
};
// e4m3fn: a sign, 4 bits of exponent (bias 7) and 3 of mantissa; all ones but the sign is NaN.
struct Float8 {
  uint8_t bits;
};

// Aborts when no case of a dispatch matches; defined once per library (dispatch.cpp).
[[noreturn]] void dispatch_failed(const char* what, int64_t value);

template <typename Fn>
void dispatch_dtype(Dtype dtype, Fn&& fn) {
  switch (dtype) {
    case Dtype::kFloat32:
      return fn.template operator()<float>();
    case Dtype::kFloat16:
      return fn.template operator()<Half>();
    case Dtype::kBFloat16:
      return fn.template operator()<BFloat16>();
    default:
      dispatch_failed("dtype", static_cast<int64_t>(dtype));
  }
}

static inline bool is_eight_bit(Dtype dtype) {
  return dtype == Dtype::kInt8 || dtype == Dtype::kFloat8;
}

template <typename Fn>
void dispatch_eight_bit(Dtype dtype, Fn&& fn) {
  if (dtype == Dtype::kInt8) return fn.template operator()<Int8>();
  if (dtype == Dtype::kFloat8) return fn.template operator()<Float8>();
  dispatch_failed("dtype of eight bits", static_cast<int64_t>(dtype));
}

// Calls fn.operator()<k>() for the k in the list that equals value.
template <int... kValues, typename Fn>
void dispatch_int(int64_t value, Fn&& fn) {
  bool found = false;
  ((value == kValues && !found ? (found = true, fn.template operator()<kValues>()) : void()), ...);
  if (!found) dispatch_failed("int", value);
}

static inline int64_t size_of(Dtype dtype) {
  if (is_eight_bit(dtype)) return 1;
  return dtype == Dtype::kFloat32 ? 4 : 2;
}

}  // namespace baton
