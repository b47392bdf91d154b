// Element types of the kernels and the mapping from a run-time dtype to a compile-time type.
//
// Functions of csrc/common are templates over a kernel's own lambda or `static`: they are compiled
// for several instruction sets, and a shared symbol could hand the baseline the AVX-512 copy.
#pragma once

#include <cstdint>

namespace baton {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// Storage only: kernels convert to float before they compute.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Ends the process of choosing when nothing fits; defined once per library (dispatch.cpp).
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
  }
  dispatch_failed("dtype", static_cast<int64_t>(dtype));
}

// Calls fn.operator()<k>() for the k of the list that equals value.
template <int... kValues, typename Fn>
void dispatch_int(int64_t value, Fn&& fn) {
  bool found = false;
  ((value == kValues && !found ? (found = true, fn.template operator()<kValues>()) : void()), ...);
  if (!found) dispatch_failed("int", value);
}

static inline int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace baton
