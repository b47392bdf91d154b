// Memory traffic of judged launches, counted warp instruction by warp instruction: the accesses of
// one instruction by the lanes of a warp make one request, of a number of 32-byte sectors of global
// memory, or of wavefronts of shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace emulation::counting {

struct Traffic {
  uint64_t requests = 0;    // warp instructions
  uint64_t bytes = 0;       // that lanes requested
  uint64_t sectors = 0;     // 32 bytes each, distinct within a request
  uint64_t wavefronts = 0;  // shared memory: passes over its 32 banks
  uint64_t ideal = 0;       // wavefronts without a bank conflict
};

struct Counters {
  std::map<std::string, Traffic> loads, stores;  // by region; "shared" is shared memory
};
Counters& counters();

void access(const std::string& region, bool shared, uint64_t address, unsigned bytes, bool write,
            const void* site);
// A matrix that a product reads.
void matrix(unsigned bytes);
void end_block();

}  // namespace emulation::counting
