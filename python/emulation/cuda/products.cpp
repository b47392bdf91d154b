#include "emulation/cuda/products.h"

#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <list>
#include <map>

#include "emulation/cuda/counters.h"
#include "emulation/cuda/tsan.h"

namespace emulation {

namespace {

struct Barrier {
  unsigned count, left;
  uint64_t phases = 0;  // that have ended
};
std::map<const void*, Barrier> barriers;

Barrier& barrier_at(const void* address) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) fail("an mbarrier that was not initialized");
  return found->second;
}

// In place of sums that are in flight: a signaling NaN, of which arithmetic makes a quiet one.
constexpr uint32_t kUnfinished = 0x7fa0dead;

// Sums of a thread that products add to.
struct Sums {
  float* registers;
  std::array<float, kProductSums> value;
  unsigned products = 0;  // that have not been waited for
};
struct Begun {
  uint64_t number;
  float* registers;
  unsigned group;
};
struct ProductThread {
  uint64_t next = 0;        // number of the product that it begins next
  std::list<Sums> sums;     // in flight
  std::deque<Begun> begun;  // in order
  unsigned groups = 0;
  bool fenced = false;  // since its registers were its own
};
std::vector<ProductThread> product_threads;

struct Running {
  Product product;
  Where where;
  std::array<std::array<uint32_t, 4>, kWarpgroup> a;
  std::array<float*, kWarpgroup> sums;
  unsigned begun = 0, waiting = 0, finished = 0;  // threads
  bool done = false;
};
struct Warpgroup {
  std::deque<Running> running;
  uint64_t first = 0;  // number of the first of them
  char word;           // its threads wait for
};
std::vector<Warpgroup> warpgroups;

Warpgroup& warpgroup() { return warpgroups[place.linear / kWarpgroup]; }
ProductThread& current_thread() { return product_threads[place.linear]; }

// While one lives, the emulator's own memory is not ThreadSanitizer's business.
struct Unseen {
  Unseen() { tsan::ignore_begin(); }
  ~Unseen() { tsan::ignore_end(); }
};

// Reads of an operand, as often as the judge is told: once per warp.
bool stands_for_warp() { return place.lane == 0; }

float as_float(uint16_t bits, bool half) {
  if (!half) return std::bit_cast<float>(uint32_t{bits} << 16);
  __half_raw raw;
  raw.x = bits;
  return __half2float(__half(raw));
}

// Where 16 bytes of an operand lie, by the PTX manual's canonical layouts in the 128-byte swizzle:
// chunk c of row r of every eight is in the place of chunk c ^ r.
struct Operand {
  uint32_t address, leading, stride;

  explicit Operand(uint64_t descriptor)
      : address((descriptor & 0x3fff) << 4),
        leading((descriptor >> 16 & 0x3fff) << 4),
        stride((descriptor >> 32 & 0x3fff) << 4) {
    if (descriptor >> 62 != 1) fail("an operand that is not in the 128-byte swizzle");
    if (address & 0x380 || descriptor >> 49 & 7) {
      fail("an operand whose rows do not begin at a multiple of 1024 bytes");
    }
  }
  // The address of eight consecutive elements of row `major`, beginning with element `minor`.
  const unsigned char* chunk(int major, int minor, bool by_rows) const {
    // A panel of 128 bytes has 64 elements; depth is at most 64.
    const uint32_t panel = by_rows ? minor / 64 * leading : 0;
    const uint32_t logical = address + major / 8 * stride + major % 8 * 128 + panel +
                             minor % 64 * static_cast<uint32_t>(sizeof(uint16_t));
    const uint32_t at = logical ^ (logical >> 3 & 0x70);
    if (at + 16 > dynamic_shared_bytes) fail("an operand outside of shared memory");
    return dynamic_shared + at;
  }
  template <typename Use>
  void for_chunks(const Product& p, Use&& use) const {
    const int majors = p.by_rows ? kProductDepth : kProductColumns;
    const int minors = p.by_rows ? kProductColumns : kProductDepth;
    for (int major = 0; major < majors; ++major) {
      for (int minor = 0; minor < minors; minor += 8) {
        use(major, minor, chunk(major, minor, p.by_rows));
      }
    }
  }
};

// Where the emulator's memory is unseen, the kernel's is not.
void announce(const Product& product, bool counts) {
  if (!(judge::kEnabled || tsan::kEnabled) || !stands_for_warp()) return;
  const void* const site = __builtin_return_address(0);
  tsan::ignore_end();
  Operand(product.operand).for_chunks(product, [&](int, int, const unsigned char* chunk) {
    judge::product_reads(chunk, 16, site);
    tsan::read(chunk, 16);
  });
  tsan::ignore_begin();
  // The four warps read it together.
  if (counts && place.warp % 4 == 0) {
    counting::matrix(kProductDepth * kProductColumns * sizeof(uint16_t));
  }
}

void run(Running& x) {
  static float a[kWarpgroup / 2][kProductDepth], b[kProductDepth][kProductColumns];
  const Product& p = x.product;
  // Fragments of the manual: row g of a warp (+ 8 for odd registers), columns 2 t and 2 t + 1 (+ 8
  // for the last two).
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 2; ++j) {
        a[row + i % 2 * 8][2 * t + j + i / 2 * 8] =
            as_float(static_cast<uint16_t>(x.a[thread][i] >> 16 * j), p.of_halves);
      }
    }
  }
  Operand(p.operand).for_chunks(p, [&](int major, int minor, const unsigned char* chunk) {
    uint16_t bits[8];
    std::memcpy(bits, chunk, 16);
    for (int i = 0; i < 8; ++i) {
      (p.by_rows ? b[major][minor + i] : b[minor + i][major]) = as_float(bits[i], p.of_halves);
    }
  });
  for (unsigned thread = 0; thread < kWarpgroup; ++thread) {
    const int row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
    for (int i = 0; i < kProductSums; ++i) {
      const int r = row + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * t + i % 2;
      float sum = p.adds ? x.sums[thread][i] : 0.0f;
      for (int k = 0; k < kProductDepth; ++k) sum += a[r][k] * b[k][column];
      x.sums[thread][i] = sum;
    }
  }
  x.done = true;
}

// Gives a thread the sums whose products have all been waited for.
void deliver(ProductThread& thread) {
  std::erase_if(thread.sums, [&](const Sums& sums) {
    if (sums.products > 0) return false;
    for (int i = 0; i < kProductSums; ++i) {
      uint32_t bits;
      std::memcpy(&bits, sums.registers + i, 4);
      if (bits != kUnfinished) {
        report("sums of a product in flight were overwritten");
        break;
      }
    }
    std::memcpy(sums.registers, sums.value.data(), sizeof(sums.value));
    return true;
  });
}

}  // namespace

void init_barrier(const void* address, unsigned count) {
  const Unseen unseen;
  if (reinterpret_cast<uintptr_t>(address) % 8 != 0) fail("misaligned mbarrier");
  judge::access(address, 8, true, __builtin_return_address(0));
  barriers[address] = {count, count};
}

void arrive(const void* address) {
  Barrier& barrier = barrier_at(address);
  // A thread that uses a barrier has to know that it was initialized.
  judge::access(address, 8, false, __builtin_return_address(0));
  judge::release(address);
  tsan::release(&barrier);
  if (--barrier.left > 0) return;
  barrier.left = barrier.count;
  ++barrier.phases;
  judge::end_phase(address);
  wake(address);
}

void wait_for_phase(const void* address, unsigned parity, Where where) {
  Barrier& barrier = barrier_at(address);
  judge::access(address, 8, false, __builtin_return_address(0));
  while (barrier.phases % 2 == parity % 2) wait_for(address, "mbarrier.try_wait", where);
  judge::acquire(address);
  tsan::acquire(&barrier);
}

void fence_proxy() { judge::fence_proxy(); }

void begin_product(float* registers, const uint32_t* a, const Product& product, Where where) {
  const Unseen unseen;
  ProductThread& thread = current_thread();
  Warpgroup& group = warpgroup();
  const uint64_t number = thread.next++;
  if (number - group.first == group.running.size()) {
    group.running.push_back({product, where, {}, {}});
  }
  Running& x = group.running[number - group.first];
  if (!(x.product == product) || x.where.line() != where.line()) {
    fail("threads of a warpgroup begin different products");
  }
  auto sums = std::find_if(thread.sums.begin(), thread.sums.end(),
                           [&](const Sums& s) { return s.registers == registers; });
  if (sums == thread.sums.end()) {
    if (!thread.fenced) report("missing wgmma.fence before a product");
    sums = thread.sums.insert(sums, {registers, {}, 0});
    std::memcpy(sums->value.data(), registers, sizeof(sums->value));
    for (int i = 0; i < kProductSums; ++i) std::memcpy(registers + i, &kUnfinished, 4);
  }
  ++sums->products;
  thread.begun.push_back({number, registers, thread.groups});
  const unsigned lane = place.linear % kWarpgroup;
  std::copy_n(a, 4, x.a[lane].begin());
  x.sums[lane] = sums->value.data();
  announce(product, true);
  if (++x.begun == kWarpgroup && !options().late_copies) run(x);
}

void fence_registers() { current_thread().fenced = true; }
void commit_products() { ++current_thread().groups; }

void wait_for_products(unsigned groups_left, Where where) {
  const Unseen unseen;
  ProductThread& thread = current_thread();
  Warpgroup& group = warpgroup();
  while (!thread.begun.empty() && thread.begun.front().group + groups_left < thread.groups) {
    const Begun begun = thread.begun.front();
    thread.begun.pop_front();
    Running& x = group.running[begun.number - group.first];
    if (++x.waiting == kWarpgroup) {
      if (!x.done) run(x);
      wake(&group.word);
    }
    while (!x.done) wait_for(&group.word, "wgmma.wait_group", where);
    announce(x.product, false);
    for (Sums& sums : thread.sums) sums.products -= sums.registers == begun.registers;
    ++x.finished;
    for (; !group.running.empty() && group.running.front().finished == kWarpgroup; ++group.first) {
      group.running.pop_front();
    }
  }
  deliver(thread);
  thread.fenced = false;
}

void forget_products(unsigned num_threads) {
  const Unseen unseen;
  barriers.clear();
  product_threads.assign((num_threads + kWarpgroup - 1) / kWarpgroup * kWarpgroup, {});
  warpgroups = std::vector<Warpgroup>(product_threads.size() / kWarpgroup);
}

void end_products() {
  if (!current_thread().begun.empty()) report("a thread returns while products are in flight");
}

}  // namespace emulation
