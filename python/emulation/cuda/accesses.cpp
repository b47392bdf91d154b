// Loads and stores that a kernel makes through a function, one instruction each, and the regions
// that it may access.
#include <cstring>
#include <sstream>

#include "emulation/cuda/runtime.h"
#include "emulation/cuda/tsan.h"

namespace emulation {

namespace {

std::string here() {
  std::ostringstream text;
  text << "block (" << place.block.x << ", " << place.block.y << ", " << place.block.z
       << ") thread " << place.linear;
  return text.str();
}

// Sizes are constants, so that no sanitizer sees a call of memcpy and takes it for an access of its
// own: the caller has announced it.
void copy(void* to, const void* from, unsigned bytes) {
  if (bytes == 16) {
    std::memcpy(to, from, 16);
  } else if (bytes == 8) {
    std::memcpy(to, from, 8);
  } else if (bytes == 4) {
    std::memcpy(to, from, 4);
  } else {
    std::memcpy(to, from, bytes);
  }
}

}  // namespace

void add_region(const std::string& name, const void* address, std::size_t bytes, bool writable) {
  judge::add_region(name, address, bytes, writable);
}

void clear_regions() { judge::clear_regions(); }

void load(void* registers, const void* memory, unsigned bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) {
    fail("misaligned load of " + std::to_string(bytes) + " bytes in " + here());
  }
  judge::access(memory, bytes, false, site);
  tsan::read(memory, bytes);
  copy(registers, memory, bytes);
}

void store(void* memory, const void* registers, unsigned bytes, const void* site) {
  if (reinterpret_cast<uintptr_t>(memory) % bytes != 0) {
    fail("misaligned store of " + std::to_string(bytes) + " bytes in " + here());
  }
  judge::access(memory, bytes, true, site);
  tsan::write(memory, bytes);
  copy(memory, registers, bytes);
}

}  // namespace emulation
