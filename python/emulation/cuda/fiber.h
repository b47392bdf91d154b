// A fiber: its own stack and the registers it was left with. One stands for one CUDA thread.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulation {

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  void* stack = nullptr;  // lowest address; null for the fiber of the caller
  std::size_t stack_bytes = 0;
  void* sanitizer_stack = nullptr;  // of AddressSanitizer
  void* sanitizer_fiber = nullptr;  // of ThreadSanitizer
};

// Makes `fiber` begin in `entry` on its stack the next time it is switched to. entry never returns.
void prepare(Fiber& fiber, void (*entry)());

// Leaves `from` and goes on where `to` was left. `last`: nobody will come back to `from`.
void switch_fiber(Fiber& from, Fiber& to, bool last);

// The first thing a new fiber does.
void entered_fiber();

// A stack, and what a sanitizer keeps per fiber, for a thread by its number in the block.
void give_stack(Fiber& fiber, unsigned thread);
// Before the first block of a launch.
void begin_fibers();
// Whether an address lies in a fiber's stack, that is, in a thread's local memory.
bool is_stack(uintptr_t address);

}  // namespace emulation
