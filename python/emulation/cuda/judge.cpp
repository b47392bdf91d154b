// The judge's memory of who touched what. Two accesses of one place, one of them a write, must be
// ordered: by the program order of a thread, by __syncthreads, by __syncwarp within a warp, by
// mbarriers, between blocks by atomics with fences, or between a grid and the one that it was
// launched behind by the wait of a thread for that one. Kept per two bytes: the last write and the
// latest reads.
#include "emulation/cuda/judge.h"

#include <link.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <sstream>
#include <unordered_map>

#include "emulation/cuda/counters.h"
#include "emulation/cuda/fiber.h"
#include "emulation/cuda/order.h"
#include "emulation/cuda/runtime.h"

namespace emulation::judge {

namespace {

struct Region {
  std::string name;
  uintptr_t begin, end;
  bool writable;
};
std::vector<Region> regions;

// When an access happened: in which stretch between barriers, and at which count of warp syncs.
struct Stamp {
  uint32_t block = 0;
  uint32_t epoch = 0;
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool valid = false;
};

constexpr int kReads = 4;
struct Cell {
  Stamp write;
  std::array<Stamp, kReads> reads;
  bool in_flight = false;  // cp.async has not landed
};

constexpr uintptr_t kCellBytes = 2, kPageBytes = 4096;
using Page = std::array<Cell, kPageBytes / kCellBytes>;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page_key = ~uintptr_t{0};
Page* last_page = nullptr;

uintptr_t shared_begin = 0, shared_end = 0;
// Blocks are numbered through launches behind one another; those of this launch from first_block.
uint32_t block = 0, first_block = 0, next_block = 0, epoch = 0;
std::array<bool, kMaxThreads> waited;  // for the grid before
Order order;                           // between the threads of a block

// Order between blocks: up to which epoch of another block everything is known to have happened.
using Known = std::unordered_map<uint32_t, uint32_t>;
Known known;                                    // to the running block
std::unordered_map<uintptr_t, Known> released;  // through an atomic's address
bool fenced = false;
uint32_t fence_epoch = 0;

uintptr_t image_begin = 0, image_end = 0;
uintptr_t launch_frame = 0;  // of the launching thread: the arguments lie in the frames above it
constexpr uintptr_t kLaunchFrames = 1 << 20;
std::set<std::pair<std::string, const void*>> reported;
// While a report is written: the linker may have chosen a kernel's copy of what strings are made
// with, which announces its accesses.
bool writing_report = false;

Cell& cell(uintptr_t address) {
  const uintptr_t key = address / kPageBytes;
  if (key != last_page_key) {
    auto& page = pages[key];
    if (!page) page = std::make_unique<Page>();
    last_page_key = key;
    last_page = page.get();
  }
  return (*last_page)[address % kPageBytes / kCellBytes];
}

Stamp now() {
  const unsigned thread = place.linear;
  return {block, epoch, order.clock(thread), static_cast<uint16_t>(thread), true};
}

bool ordered(const Stamp& stamp) {
  if (!stamp.valid) return true;
  if (stamp.block < first_block) return waited[place.linear];
  if (stamp.block != block) {
    const auto found = known.find(stamp.block);
    return found != known.end() && stamp.epoch < found->second;
  }
  if (stamp.thread == place.linear || stamp.epoch < epoch) return true;
  return order.knows(place.linear, stamp.thread, stamp.clock);
}

void complain(const std::string& kind, const void* site, uintptr_t address, unsigned bytes,
              bool write, const Stamp* other) {
  writing_report = true;
  if (!reported.insert({kind, site}).second) {
    writing_report = false;
    return;
  }
  std::ostringstream text;
  text << kind << ": " << (write ? "write" : "read") << " of " << bytes << " bytes at ";
  const auto region = std::find_if(regions.begin(), regions.end(), [&](const Region& r) {
    return address >= r.begin && address < r.end;
  });
  if (region != regions.end()) {
    text << region->name << " + " << address - region->begin;
  } else if (address >= shared_begin - 65536 && address < shared_end + 65536) {
    text << "shared memory " << static_cast<int64_t>(address - shared_begin);
  } else {
    text << "an unknown place";
  }
  text << " by block " << block << " thread " << place.linear;
  if (other) text << "; block " << other->block << " thread " << other->thread << " was there";
  text << " [+0x" << std::hex << reinterpret_cast<uintptr_t>(site) - image_begin << "]";
  report(text.str());
  writing_report = false;
}

void find_image() {
  if (image_begin) return;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        uintptr_t low = ~uintptr_t{0}, high = 0;
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_LOAD) continue;
          low = std::min(low, info->dlpi_addr + header.p_vaddr);
          high = std::max(high, info->dlpi_addr + header.p_vaddr + header.p_memsz);
        }
        const auto here = reinterpret_cast<uintptr_t>(&image_begin);
        if (here < low || here >= high) return 0;
        image_begin = low;
        image_end = high;
        return 1;
      },
      nullptr);
}

void remember_read(Cell& c, const Stamp& stamp) {
  for (Stamp& read : c.reads) {
    if (read.valid && !(read.block == stamp.block && read.thread == stamp.thread) &&
        !ordered(read)) {
      continue;
    }
    read = stamp;
    return;
  }
  // More readers at once than fit: some of each kind stay.
  c.reads[stamp.thread % kReads] = stamp;
}

const char* unordered(const Stamp& stamp) {
  return stamp.block < first_block ? "missing wait for the grid before" : "race";
}

void touch(uintptr_t address, unsigned bytes, bool write, const void* site, bool shared,
           bool marks) {
  const Stamp stamp = now();
  for (uintptr_t a = address & ~(kCellBytes - 1); a < address + bytes; a += kCellBytes) {
    Cell& c = cell(a);
    if (c.in_flight) complain("missing wait for cp.async", site, address, bytes, write, &c.write);
    if (!ordered(c.write)) {
      complain(unordered(c.write), site, address, bytes, write, &c.write);
    }
    if (!write) {
      if (shared && !c.write.valid && !c.in_flight) {
        complain("read of unwritten shared memory", site, address, bytes, false, nullptr);
      }
      remember_read(c, stamp);
      continue;
    }
    for (const Stamp& read : c.reads) {
      if (!ordered(read)) complain(unordered(read), site, address, bytes, true, &read);
    }
    if (marks) {
      c.write = stamp;
      c.reads = {};
    }
  }
}

enum class Space { kShared, kGlobal, kIgnored };

Space classify(uintptr_t address, unsigned bytes, bool write, const void* site, std::string& name) {
  if (address >= shared_begin && address + bytes <= shared_end) {
    name = "shared";
    return Space::kShared;
  }
  for (const Region& region : regions) {
    if (address < region.begin || address + bytes > region.end) continue;
    if (write && !region.writable) {
      complain("write into an input", site, address, bytes, true, nullptr);
    }
    name = region.name;
    return Space::kGlobal;
  }
  if (shared_begin < shared_end && address + 4096 >= shared_begin && address < shared_end + 4096) {
    complain("outside of shared memory", site, address, bytes, write, nullptr);
    return Space::kIgnored;
  }
  if (!regions.empty()) complain("outside of every tensor", site, address, bytes, write, nullptr);
  return Space::kIgnored;
}

bool of_the_emulator(uintptr_t address) {
  return (address >= image_begin && address < image_end) || is_stack(address) ||
         (address >= launch_frame && address < launch_frame + kLaunchFrames);
}

}  // namespace

void add_region(const std::string& name, const void* address, std::size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  regions.push_back({name, begin, begin + bytes, writable});
}
void clear_regions() { regions.clear(); }

void begin_launch(bool behind) {
  find_image();
  launch_frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  first_block = behind ? next_block : 0;
  next_block = first_block + place.grid_size.x * place.grid_size.y * place.grid_size.z;
  if (!behind) {
    pages.clear();
    last_page_key = ~uintptr_t{0};
  }
  known.clear();
  released.clear();
  reported.clear();
  fenced = false;
}
void end_launch() {}

void begin_block(unsigned char* shared, std::size_t shared_bytes) {
  const dim3 grid = place.grid_size;
  block = first_block + place.block.x + grid.x * (place.block.y + grid.y * place.block.z);
  waited.fill(false);
  epoch = 0;
  known.clear();
  fenced = false;
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_end = shared_begin + shared_bytes;
  order.begin(place.block_size.x * place.block_size.y * place.block_size.z);
  // The memory may have been another block's.
  for (uintptr_t a = shared_begin; a < shared_end; a += kCellBytes) cell(a) = Cell{};
}
void end_block() { counting::end_block(); }

void access(const void* memory, unsigned bytes, bool write, const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (!dynamic_shared || writing_report || of_the_emulator(address)) return;
  std::string name;
  const Space space = classify(address, bytes, write, site, name);
  if (space == Space::kIgnored) return;
  counting::access(name, space == Space::kShared, address, bytes, write, site);
  touch(address, bytes, write, site, space == Space::kShared, true);
}

void atomic(const void* memory, unsigned bytes, const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (of_the_emulator(address)) return;
  std::string name;
  const Space space = classify(address, bytes, true, site, name);
  if (space == Space::kIgnored) return;
  counting::access(name, space == Space::kShared, address, bytes, true, site);
  // Atomics do not race with one another: the place counts as written only.
  for (uintptr_t a = address & ~(kCellBytes - 1); a < address + bytes; a += kCellBytes) {
    Cell& c = cell(a);
    if (space == Space::kShared && !c.write.valid) {
      complain("read of unwritten shared memory", site, address, bytes, false, nullptr);
    }
  }
  Known& place_knows = released[address];
  for (const auto& [other, until] : place_knows) known[other] = std::max(known[other], until);
  if (fenced) {
    const uint32_t until = fence_epoch + 1 >= epoch ? epoch : fence_epoch;
    place_knows[block] = std::max(place_knows[block], until);
  }
}

void sync_warp(unsigned warp, unsigned mask) { order.sync_warp(warp * kWarpSize, mask); }
void sync_block() {
  ++epoch;
  order.sync_block();
}
void release(const void* word) { order.release(place.linear, word); }
void end_phase(const void* word) { order.end_phase(word); }
void acquire(const void* word) { order.acquire(place.linear, word); }
void fence_proxy() { order.fence(place.linear); }

void product_reads(const void* memory, unsigned bytes, const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  touch(address, bytes, false, site, true, false);
  for (uintptr_t a = address; a < address + bytes; a += kCellBytes) {
    const Stamp& write = cell(a).write;
    if (write.valid && !order.is_fenced(place.linear, write.thread, write.clock)) {
      complain("missing proxy fence", site, address, bytes, false, &write);
      return;
    }
  }
}

void fence() {
  fenced = true;
  fence_epoch = epoch;
}

void wait_for_grid_before() { waited[place.linear] = true; }

void copy_begins(void* target, const void* source, unsigned bytes, unsigned source_bytes,
                 const void* site) {
  if (source_bytes) access(source, source_bytes, false, site);
  const auto address = reinterpret_cast<uintptr_t>(target);
  std::string name;
  if (classify(address, bytes, true, site, name) != Space::kShared) return;
  counting::access(name, true, address, bytes, true, site);
  touch(address, bytes, true, site, true, false);
  for (uintptr_t a = address; a < address + bytes; a += kCellBytes) {
    cell(a).in_flight = true;
    cell(a).write = now();
  }
}

void copy_landed(void* target, unsigned bytes) {
  const auto address = reinterpret_cast<uintptr_t>(target);
  if (address < shared_begin || address + bytes > shared_end) return;
  for (uintptr_t a = address; a < address + bytes; a += kCellBytes) {
    cell(a).in_flight = false;
    cell(a).write = now();
    cell(a).reads = {};
  }
}

namespace {
void checked_access(const void* memory, unsigned bytes, bool write, const void* site) {
  const auto address = reinterpret_cast<uintptr_t>(memory);
  if (address % bytes != 0 && dynamic_shared && !of_the_emulator(address)) {
    complain("misaligned", site, address, bytes, write, nullptr);
  }
  access(memory, bytes, write, site);
}
}  // namespace

}  // namespace emulation::judge

// The functions that the compiler inserts calls of.
#define SITE __builtin_return_address(0)
#define ANNOUNCED(bytes)                                                                          \
  void __tsan_read##bytes(void* p) { emulation::judge::checked_access(p, bytes, false, SITE); }   \
  void __tsan_write##bytes(void* p) { emulation::judge::checked_access(p, bytes, true, SITE); }   \
  void __tsan_unaligned_read##bytes(void* p) { emulation::judge::access(p, bytes, false, SITE); } \
  void __tsan_unaligned_write##bytes(void* p) { emulation::judge::access(p, bytes, true, SITE); }
extern "C" {
ANNOUNCED(1)
ANNOUNCED(2)
ANNOUNCED(4)
ANNOUNCED(8)
ANNOUNCED(16)
void __tsan_read_range(void* p, unsigned long bytes) {
  emulation::judge::access(p, static_cast<unsigned>(bytes), false, SITE);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  emulation::judge::access(p, static_cast<unsigned>(bytes), true, SITE);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
