#include "emulation/cuda/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "emulation/cuda/runtime.h"
#include "emulation/cuda/tsan.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// The callee-saved registers of the System V ABI go on the old stack; kernels keep the default
// floating-point control words.
extern "C" void emulation_switch_stack(void** from, void* to);
asm(R"(
.text
.globl emulation_switch_stack
.hidden emulation_switch_stack
.type emulation_switch_stack,@function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack,.-emulation_switch_stack
)");
#endif

namespace emulation {

void prepare(Fiber& fiber, void (*entry)()) {
#if defined(__x86_64__)
  // The entry sees a stack as after a call: 16-byte aligned before the return address.
  auto* top = static_cast<uint64_t*>(fiber.stack) + fiber.stack_bytes / 8;
  top[-1] = 0;
  top[-2] = reinterpret_cast<uint64_t>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = 0;
  fiber.stack_pointer = top - 8;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

#if defined(__SANITIZE_ADDRESS__)
namespace {
const void* caller_stack = nullptr;
std::size_t caller_stack_bytes = 0;
}  // namespace
#endif

void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = to.stack ? to.stack : caller_stack;
  const std::size_t bytes = to.stack ? to.stack_bytes : caller_stack_bytes;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer_stack, stack, bytes);
#endif
#if defined(EMULATION_TSAN)
  // No order between two threads comes from the emulator's own switching.
  if (!from.stack) from.sanitizer_fiber = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.sanitizer_fiber, 1);
#endif
#if defined(__x86_64__)
  emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.sanitizer_stack, nullptr, nullptr);
#endif
}

void entered_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  // The launching thread's stack is the one that no fiber knows the place of: it is learned from
  // the first fiber that it enters.
  if (!caller_stack) {
    caller_stack = stack;
    caller_stack_bytes = bytes;
  }
#endif
}

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
// ThreadSanitizer would take a stack that passes from one fiber to the next for shared memory.
constexpr std::size_t kStacks = (tsan::kEnabled ? 64 : 1) * kMaxThreads;
unsigned char* stacks = nullptr;  // one behind the other

void* stack(std::size_t index) {
  if (!stacks) {
    void* memory = mmap(nullptr, kStacks * kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stacks = static_cast<unsigned char*>(memory);
  }
  return stacks + index % kStacks * kStackBytes;
}

#if defined(EMULATION_TSAN)
// Fibers that ThreadSanitizer knows at a time, the last ones of a launch: 16 blocks of 128 threads.
// A new fiber may get the number of one that was destroyed, and the two are then not seen to race.
constexpr std::size_t kKnownFibers = 2 * kMaxThreads;
std::vector<Fiber> known_fibers;  // their stacks and what the sanitizer calls them
#endif
std::size_t num_fibers = 0;  // of this launch

}  // namespace

void begin_fibers() { num_fibers = 0; }

void give_stack(Fiber& fiber, [[maybe_unused]] unsigned thread) {
#if defined(EMULATION_TSAN)
  // Blocks of one launch may race, launches may not: the next one may have the same fibers.
  static std::size_t num_created = 0;
  const std::size_t index = num_fibers++ % kKnownFibers;
  const bool is_used = num_fibers > kKnownFibers;
  if (index == known_fibers.size()) known_fibers.emplace_back();
  Fiber& known = known_fibers[index];
  if (is_used) __tsan_destroy_fiber(known.sanitizer_fiber);
  if (is_used || !known.stack) {
    known.stack = stack(num_created++);
    known.sanitizer_fiber = __tsan_create_fiber(0);
  }
  fiber = known;
#else
  fiber.stack = stack(thread);
#endif
  fiber.stack_bytes = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  // A launch that ended early left frames behind.
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
}

bool is_stack(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(stacks);
  return address >= begin && address < begin + kStacks * kStackBytes;
}

}  // namespace emulation
