// The emulator's calls of the real ThreadSanitizer. In other builds everything here is empty.
#pragma once

#include <cstddef>

#if defined(EMULATION_TSAN)
#include <sanitizer/tsan_interface.h>

extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
int __tsan_atomic32_fetch_add(volatile int*, int, int order);
long __tsan_atomic64_fetch_add(volatile long*, long, int order);
void __tsan_ignore_thread_begin();
void __tsan_ignore_thread_end();
}
#endif

namespace emulation::tsan {

#if defined(EMULATION_TSAN)
constexpr bool kEnabled = true;
// Order comes through a word: after an acquire comes what was before the releases until then.
inline void release(void* word) { __tsan_release(word); }
inline void acquire(void* word) { __tsan_acquire(word); }
inline void read(const void* address, std::size_t bytes) {
  __tsan_read_range(const_cast<void*>(address), bytes);
}
inline void write(void* address, std::size_t bytes) { __tsan_write_range(address, bytes); }
// An atomic of four or eight bytes, which adds nothing; releases as well where there was a fence.
inline void atomic(void* address, std::size_t bytes, bool fenced) {
  const int order = fenced ? __ATOMIC_ACQ_REL : __ATOMIC_ACQUIRE;
  if (bytes == 8) {
    __tsan_atomic64_fetch_add(static_cast<long*>(address), 0, order);
  } else {
    __tsan_atomic32_fetch_add(static_cast<int*>(address), 0, order);
  }
}
// Between the two, the running fiber's accesses are nobody's business.
inline void ignore_begin() { __tsan_ignore_thread_begin(); }
inline void ignore_end() { __tsan_ignore_thread_end(); }
#else
constexpr bool kEnabled = false;
inline void release(void*) {}
inline void acquire(void*) {}
inline void read(const void*, std::size_t) {}
inline void write(void*, std::size_t) {}
inline void atomic(void*, std::size_t, bool) {}
inline void ignore_begin() {}
inline void ignore_end() {}
#endif

}  // namespace emulation::tsan
