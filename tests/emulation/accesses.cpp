// Loads and stores that a kernel makes through a function, one instruction each.
#include <cstring>
#include <sstream>

#include "emulation/runtime.h"

#if defined(EMULATION_TSAN)
extern "C" void __tsan_read_range(void*, unsigned long);
extern "C" void __tsan_write_range(void*, unsigned long);
#endif

namespace emulation {

namespace {

std::string here() {
  std::ostringstream text;
  text << "block (" << place.block.x << ", " << place.block.y << ", " << place.block.z
       << ") thread " << place.linear;
  return text.str();
}

}  // namespace

void load(void* registers, const void* memory, unsigned bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) {
    fail("misaligned load of " + std::to_string(bytes) + " bytes in " + here());
  }
  judge::access(memory, bytes, false, site);
#if defined(EMULATION_TSAN)
  __tsan_read_range(const_cast<void*>(memory), bytes);
#endif
  std::memcpy(registers, memory, bytes);
}

void store(void* memory, const void* registers, unsigned bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) {
    fail("misaligned store of " + std::to_string(bytes) + " bytes in " + here());
  }
  judge::access(memory, bytes, true, site);
#if defined(EMULATION_TSAN)
  __tsan_write_range(memory, bytes);
#endif
  std::memcpy(memory, registers, bytes);
}

}  // namespace emulation
