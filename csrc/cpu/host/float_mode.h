// How a thread rounds, and whether it flushes subnormal numbers.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton::cpu {

// The calling thread's mode, without the exceptions it has seen.
inline uint64_t float_mode() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__)
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
#else
  return 0;
#endif
}

inline void set_float_mode([[maybe_unused]] uint64_t mode) {
#if defined(__x86_64__)
  _mm_setcsr(static_cast<uint32_t>(mode));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(mode));
#endif
}

// Another thread's mode, until the end of the block.
class FloatModeScope {
 public:
  explicit FloatModeScope(uint64_t mode) : before_(float_mode()) {
    if (mode != before_) set_float_mode(mode);
  }
  ~FloatModeScope() {
    if (float_mode() != before_) set_float_mode(before_);
  }
  FloatModeScope(const FloatModeScope&) = delete;
  FloatModeScope& operator=(const FloatModeScope&) = delete;

 private:
  uint64_t before_;
};

}  // namespace baton::cpu
