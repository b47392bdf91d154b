#include "emulation/cuda/counters.h"

#include <algorithm>
#include <array>
#include <set>
#include <unordered_map>
#include <vector>

#include "emulation/cuda/runtime.h"

namespace emulation::counting {

namespace {

struct Request {
  std::array<uint64_t, kWarpSize> addresses{};
  unsigned mask = 0;
  unsigned bytes = 0;
  bool shared = false, write = false;
  std::string region;
};

// The n-th time a lane executes an instruction belongs with the n-th time of the other lanes.
struct Key {
  const void* site;
  unsigned turn;
  auto operator<=>(const Key&) const = default;
};
std::array<std::map<Key, Request>, kMaxThreads / kWarpSize> requests;
std::array<std::unordered_map<const void*, unsigned>, kMaxThreads> turns;

// Passes over the banks: lanes go in groups that request 128 bytes at most; within a group,
// distinct words of one bank follow one another.
uint64_t wavefronts(const Request& r) {
  const unsigned lanes_at_once = std::max(1u, std::min(kWarpSize, 128 / std::max(4u, r.bytes)));
  uint64_t total = 0;
  for (unsigned first = 0; first < kWarpSize; first += lanes_at_once) {
    std::array<std::set<uint64_t>, 32> banks;
    for (unsigned lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(r.mask >> lane & 1)) continue;
      const uint64_t end = r.addresses[lane] + r.bytes;
      for (uint64_t word = r.addresses[lane] / 4; word * 4 < end; ++word) {
        banks[word % 32].insert(word);
      }
    }
    std::size_t most = 0;
    for (const auto& bank : banks) most = std::max(most, bank.size());
    total += most;
  }
  return total;
}

uint64_t ideal_wavefronts(const Request& r) {
  std::set<uint64_t> words;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(r.mask >> lane & 1)) continue;
    for (uint64_t word = r.addresses[lane] / 4; word * 4 < r.addresses[lane] + r.bytes; ++word) {
      words.insert(word);
    }
  }
  return (words.size() + 31) / 32;
}

void finish(const Request& r) {
  Traffic& t = (r.write ? counters().stores : counters().loads)[r.region];
  ++t.requests;
  if (r.shared) {
    t.wavefronts += wavefronts(r);
    t.ideal += ideal_wavefronts(r);
    return;
  }
  std::array<uint64_t, 2 * kWarpSize> sectors;
  unsigned count = 0;
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    if (!(r.mask >> lane & 1)) continue;
    for (uint64_t s = r.addresses[lane] / 32; s * 32 < r.addresses[lane] + r.bytes; ++s) {
      if (count < sectors.size()) sectors[count++] = s;
    }
  }
  std::sort(sectors.begin(), sectors.begin() + count);
  t.sectors += std::unique(sectors.begin(), sectors.begin() + count) - sectors.begin();
}

}  // namespace

Counters& counters() {
  static Counters value;
  return value;
}

void access(const std::string& region, bool shared, uint64_t address, unsigned bytes, bool write,
            const void* site) {
  // Not by requests: lanes that skip a turn bring later turns of two regions together.
  (write ? counters().stores : counters().loads)[region].bytes += bytes;
  auto& warp = requests[place.warp];
  const Key key{site, turns[place.linear][site]++};
  Request& request = warp[key];
  if (request.mask == 0) {
    request.bytes = bytes;
    request.shared = shared;
    request.write = write;
    request.region = region;
  }
  request.addresses[place.lane] = address;
  request.mask |= 1u << place.lane;
  if (request.mask == ~0u) {
    finish(request);
    warp.erase(key);
  }
}

void matrix(unsigned bytes) {
  Traffic& t = counters().loads["shared"];
  ++t.requests;
  t.bytes += bytes;
  t.wavefronts += bytes / 128;
  t.ideal += bytes / 128;
}

void end_block() {
  for (auto& warp : requests) {
    for (const auto& [key, request] : warp) finish(request);
    warp.clear();
  }
  for (auto& thread : turns) thread.clear();
}

}  // namespace emulation::counting
