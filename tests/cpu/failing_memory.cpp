// Preloaded: makes the k-th allocation fail that one thread makes for one library.
//
// The library's own calls of operator new count, identified by their return address, and every
// posix_memalign of the thread, because torch allocates new tensors with it.
#include <dlfcn.h>
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>

#include <atomic>
#include <new>

namespace {

thread_local int64_t to_go = -1;  // allocations until the one that fails; below 0: none fails
thread_local int64_t seen = 0;
thread_local bool is_armed = false;
uintptr_t library_begin = 0, library_end = 0;
std::atomic<int64_t> held{0};  // allocations that the library has not freed

bool fails() {
  ++seen;
  return to_go >= 0 && to_go-- == 0;
}

bool is_library(void* caller) {
  const auto address = reinterpret_cast<uintptr_t>(caller);
  return address >= library_begin && address < library_end;
}

void* take(size_t size, void* caller) {
  if (is_library(caller)) {
    if (is_armed && fails()) return nullptr;
    held.fetch_add(1, std::memory_order_relaxed);
  }
  return malloc(size ? size : 1);
}

void give(void* memory, void* caller) {
  if (memory && is_library(caller)) held.fetch_sub(1, std::memory_order_relaxed);
  free(memory);
}

}  // namespace

void* operator new(size_t size) {
  void* memory = take(size, __builtin_return_address(0));
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) {
  void* memory = take(size, __builtin_return_address(0));
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  return take(size, __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { give(memory, __builtin_return_address(0)); }
void operator delete[](void* memory) noexcept { give(memory, __builtin_return_address(0)); }
void operator delete(void* memory, size_t) noexcept { give(memory, __builtin_return_address(0)); }
void operator delete[](void* memory, size_t) noexcept { give(memory, __builtin_return_address(0)); }

extern "C" {

int posix_memalign(void** memory, size_t alignment, size_t size) {
  static const auto real =
      reinterpret_cast<int (*)(void**, size_t, size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  if (is_armed && fails()) return ENOMEM;
  return real(memory, alignment, size);
}

void failing_memory_of(uintptr_t begin, uintptr_t end) {
  library_begin = begin;
  library_end = end;
}

// Makes allocation number `failing` of this thread fail, counted from 0; none if it is negative.
void failing_memory_arm(int64_t failing) {
  to_go = failing;
  seen = 0;
  is_armed = true;
}

// Returns the number of allocations.
int64_t failing_memory_disarm() {
  is_armed = false;
  return seen;
}

int64_t failing_memory_held() { return held.load(std::memory_order_relaxed); }
}
