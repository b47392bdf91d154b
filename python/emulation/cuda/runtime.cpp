#include "emulation/cuda/runtime.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <numeric>
#include <random>
#include <sstream>

#include "emulation/cuda/fiber.h"
#include "emulation/cuda/products.h"
#include "emulation/cuda/tsan.h"

namespace emulation {

Place place;
unsigned char* dynamic_shared = nullptr;
std::size_t dynamic_shared_bytes = 0;
std::vector<Recording>* recordings = nullptr;
bool capturing = false;

namespace {

enum class State { kReady, kAtBarrier, kInWarp, kAtWord, kDone };

struct Copy {
  unsigned char* target;
  const unsigned char* source;
  unsigned bytes, source_bytes;
  unsigned group;
};

struct Thread {
  Fiber fiber;
  State state = State::kReady;
  uint3 index{};
  unsigned linear = 0;
  Where where;
  // The warp-wide operation that it waits in.
  unsigned mask = 0;
  WarpFunction run = nullptr;
  void* data = nullptr;
  const char* name = "";
  const void* word = nullptr;  // that it waits for
  // cp.async: copies in flight, and how many groups were committed.
  std::vector<Copy> copies;
  unsigned groups = 0;
  unsigned num_barriers = 0;
  unsigned num_warp_syncs = 0;
  bool waited = false;  // for the grid before
};

std::vector<Thread> threads(kMaxThreads);
std::vector<unsigned> order;  // threads of the block in the order they run
unsigned num_threads = 0, num_done = 0, num_waiting = 0;
unsigned position = 0;                      // of the running thread in `order`
unsigned first_waiting = 0;                 // a thread at the barrier, when num_waiting > 0
unsigned in_warp[kMaxThreads / kWarpSize];  // lanes that wait in a warp-wide operation
Fiber caller;
const Kernel* kernel = nullptr;
bool is_behind = false;  // launched behind another grid: every thread has to wait for it
const Thread* ended_early = nullptr;  // did not
bool failed = false;
std::vector<void*> used_shared;  // of finished blocks
// The judge takes what lies this near to shared memory for an access past its end: nothing else
// may.
constexpr std::size_t kSharedMargin = judge::kEnabled ? 4096 : 0;
std::vector<std::string> reports;
// Words through which ThreadSanitizer is told of order. Each block has its own, since a
// barrier orders nothing between blocks; two per use, since a thread may be in the next barrier
// before another has left the last.
struct SyncWords {
  char barrier[2], warp[kMaxThreads / kWarpSize][2];
  bool fenced;
};
std::deque<SyncWords> sync_words;  // of the blocks of this launch
char start_word, launch_word;

Thread& current() { return threads[place.linear]; }

std::string describe(const Thread& thread) {
  std::ostringstream text;
  text << "block (" << place.block.x << ", " << place.block.y << ", " << place.block.z
       << ") thread (" << thread.index.x << ", " << thread.index.y << ", " << thread.index.z << ")";
  return text.str();
}

std::string describe(Where where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

void step_into(unsigned next) {
  position = next;
  Thread& thread = threads[order[next]];
  place.thread = thread.index;
  place.linear = thread.linear;
  place.warp = thread.linear / kWarpSize;
  place.lane = thread.linear % kWarpSize;
}

void leave_block(Fiber& from) { switch_fiber(from, caller, true); }

std::string stuck() {
  std::ostringstream text;
  text << "divergent barrier: block (" << place.block.x << ", " << place.block.y << ", "
       << place.block.z << ") is stuck";
  for (unsigned i = 0, shown = 0; i < num_threads && shown < 40; ++i) {
    const Thread& thread = threads[i];
    if (thread.state == State::kDone) continue;
    text << (shown++ ? ", " : ": ") << "thread " << i << " in " << thread.name << " at "
         << describe(thread.where);
    // One of each kind is enough to understand it.
    while (i + 1 < num_threads && threads[i + 1].state == thread.state &&
           threads[i + 1].where.line() == thread.where.line()) {
      ++i;
    }
  }
  if (num_done > 0) text << ", " << num_done << " threads have returned";
  return text.str();
}

// Goes on with the next thread that can; `from` is where the running one stays behind.
void switch_to_next(Thread& from) {
  for (unsigned i = 1; i <= num_threads; ++i) {
    const unsigned next = (position + i) % num_threads;
    Thread& thread = threads[order[next]];
    if (thread.state != State::kReady) continue;
    if (&thread == &from) return;
    step_into(next);
    switch_fiber(from.fiber, thread.fiber, from.state == State::kDone);
    return;
  }
  if (num_done < num_threads) {
    report(stuck());
    failed = true;
  }
  leave_block(from.fiber);
}

void release_barrier() {
  for (unsigned i = 0; i < num_threads; ++i) {
    if (threads[i].state == State::kAtBarrier) threads[i].state = State::kReady;
  }
  num_waiting = 0;
  judge::sync_block();
}

void land(Thread& thread, unsigned before_group) {
  std::erase_if(thread.copies, [&](const Copy& copy) {
    if (copy.group >= before_group) return false;
    if (options().late_copies) {
      tsan::write(copy.target, copy.bytes);
      std::memcpy(copy.target, copy.source, copy.source_bytes);
      std::memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    }
    judge::copy_landed(copy.target, copy.bytes);
    return true;
  });
}

void thread_main() {
  entered_fiber();
  tsan::acquire(&start_word);
  kernel->invoke(kernel->function, kernel->arguments);
  Thread& thread = current();
  // The hardware finishes what is in flight before the block's memory is given back.
  land(thread, ~0u);
  if (is_behind && !thread.waited) ended_early = &thread;
  end_products();
  tsan::release(&launch_word);
  thread.state = State::kDone;
  ++num_done;
  if (num_waiting > 0 && num_waiting + num_done == num_threads) {
    report("divergent barrier: " + describe(thread) + " returned while others wait at " +
           describe(threads[first_waiting].where));
    release_barrier();
  }
  switch_to_next(thread);
  std::abort();
}

std::vector<unsigned> permutation(unsigned count, Order kind, std::mt19937_64& random) {
  std::vector<unsigned> result(count);
  std::iota(result.begin(), result.end(), 0u);
  if (kind == Order::kBackward) std::reverse(result.begin(), result.end());
  if (kind == Order::kShuffled) std::shuffle(result.begin(), result.end(), random);
  return result;
}

void make_order(std::mt19937_64& random) {
  order.clear();
  const unsigned num_warps = (num_threads + kWarpSize - 1) / kWarpSize;
  for (const unsigned warp : permutation(num_warps, options().warps, random)) {
    for (const unsigned lane : permutation(kWarpSize, options().threads, random)) {
      if (warp * kWarpSize + lane < num_threads) order.push_back(warp * kWarpSize + lane);
    }
  }
}

void free_block_memory() {
  for (void* memory : used_shared) std::free(memory);
  used_shared.clear();
  sync_words.clear();
}

void run_block(std::size_t shared_bytes, std::mt19937_64& random) {
  // NaN in every floating-point type, and a far-off index as an integer.
  void* memory = nullptr;
  const std::size_t bytes = std::max<std::size_t>(shared_bytes, 1) + 2 * kSharedMargin;
  // A kernel may find the multiple of 1024 that it needs in the address.
  if (posix_memalign(&memory, 1024, bytes) != 0) std::abort();
  dynamic_shared_bytes = shared_bytes;
  dynamic_shared = static_cast<unsigned char*>(memory) + kSharedMargin;
  if (shared_bytes) std::memset(dynamic_shared, 0xff, shared_bytes);
  judge::begin_block(dynamic_shared, shared_bytes);
  make_order(random);
  forget_products(num_threads);
  sync_words.emplace_back();
  num_done = num_waiting = 0;
  std::fill(std::begin(in_warp), std::end(in_warp), 0u);
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    thread.state = State::kReady;
    thread.name = "no barrier";
    thread.copies.clear();
    thread.groups = thread.num_barriers = thread.num_warp_syncs = 0;
    thread.waited = false;
    thread.linear = i;
    thread.index = {i % place.block_size.x, i / place.block_size.x % place.block_size.y,
                    i / place.block_size.x / place.block_size.y};
    give_stack(thread.fiber, i);
    prepare(thread.fiber, thread_main);
  }
  // After the launching thread's work, not after that of other blocks.
  tsan::release(&start_word);
  step_into(0);
  switch_fiber(caller, threads[order[0]].fiber, false);
  judge::end_block();
  used_shared.push_back(dynamic_shared - kSharedMargin);
  dynamic_shared = nullptr;
  if (ended_early) {
    report("missing wait for the grid before: " + describe(*ended_early) + " ends without");
    ended_early = nullptr;
    is_behind = false;  // one report is enough
  }
  if (!tsan::kEnabled) free_block_memory();
}

// cp.async has its own wording of what a warp-wide operation must be.
[[noreturn]] void diverged(const Thread& thread, const Thread& other) {
  fail("divergent warp operation: " + describe(thread) + " in " + thread.name + " at " +
       describe(thread.where) + ", while " + describe(other) + " is in " + other.name + " at " +
       describe(other.where));
}

}  // namespace

Options& options() {
  static Options value;
  return value;
}

std::vector<std::string> take_reports() { return std::exchange(reports, {}); }

void report(const std::string& text) {
  if (std::find(reports.begin(), reports.end(), text) == reports.end()) reports.push_back(text);
}

void fail(const std::string& text) {
  report(text);
  failed = true;
  leave_block(current().fiber);
  std::abort();
}

void block_barrier(Where where) {
  Thread& thread = current();
  thread.where = where;
  thread.name = "__syncthreads";
  if (num_waiting++ == 0) first_waiting = thread.linear;
  const Thread& first = threads[first_waiting];
  if (first.where.line() != where.line()) {
    fail("divergent barrier: " + describe(thread) + " at " + describe(where) + ", " +
         describe(first) + " at " + describe(first.where));
  }
  char* word = &sync_words.back().barrier[thread.num_barriers++ % 2];
  tsan::release(word);
  if (num_waiting + num_done == num_threads) {
    if (num_done > 0) {
      report("divergent barrier: " + describe(thread) + " waits at " + describe(where) +
             ", which others have returned without reaching");
    }
    release_barrier();
  } else {
    thread.state = State::kAtBarrier;
    switch_to_next(thread);
  }
  tsan::acquire(word);
}

void warp_operation(unsigned mask, WarpFunction run, void* data, const char* name, Where where,
                    bool orders_memory) {
  Thread& thread = current();
  thread.mask = mask;
  thread.run = run;
  thread.data = data;
  thread.name = name;
  thread.where = where;
  if (!(mask >> place.lane & 1)) {
    fail(std::string(name) + ": " + describe(thread) + " is not in its own mask at " +
         describe(where));
  }
  char* word = &sync_words.back().warp[place.warp][thread.num_warp_syncs % 2];
  if (orders_memory) {
    ++thread.num_warp_syncs;
    tsan::release(word);
  }
  Thread* warp = &threads[place.warp * kWarpSize];
  unsigned& waiting = in_warp[place.warp];
  for (unsigned rest = mask & waiting, n = 0; rest && n < 1; rest &= rest - 1, ++n) {
    const Thread& other = warp[std::countr_zero(rest)];
    if (other.run != run || other.mask != mask) diverged(thread, other);
  }
  waiting |= 1u << place.lane;
  if (mask & ~waiting) {
    if (place.warp * kWarpSize + std::bit_width(mask) > num_threads) {
      fail(std::string(name) + ": the mask names lanes that the block does not have at " +
           describe(where));
    }
    thread.state = State::kInWarp;
    switch_to_next(thread);
  } else {
    void* lanes[kWarpSize] = {};
    for (unsigned rest = mask; rest; rest &= rest - 1) {
      Thread& other = warp[std::countr_zero(rest)];
      if (other.run != run || other.mask != mask) diverged(thread, other);
      lanes[std::countr_zero(rest)] = other.data;
      other.state = State::kReady;
    }
    waiting &= ~mask;
    // Operands lie on other fibers' stacks, where they stand for registers.
    tsan::ignore_begin();
    run(lanes, mask);
    tsan::ignore_end();
    if (orders_memory) judge::sync_warp(place.warp, mask);
  }
  if (orders_memory) tsan::acquire(word);
}

void wait_for(const void* word, const char* name, Where where) {
  Thread& thread = current();
  thread.state = State::kAtWord;
  thread.word = word;
  thread.name = name;
  thread.where = where;
  switch_to_next(thread);
}

void wake(const void* word) {
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = threads[i];
    if (thread.state == State::kAtWord && thread.word == word) thread.state = State::kReady;
  }
}

void copy_async(void* target, const void* source, unsigned bytes, unsigned source_bytes,
                [[maybe_unused]] const void* site) {
  Thread& thread = current();
  if (reinterpret_cast<uintptr_t>(target) % bytes || reinterpret_cast<uintptr_t>(source) % bytes) {
    fail("misaligned cp.async of " + std::to_string(bytes) + " bytes in " + describe(thread));
  }
  judge::copy_begins(target, source, bytes, source_bytes, site);
  tsan::read(source, source_bytes);
  tsan::write(target, bytes);
  auto* to = static_cast<unsigned char*>(target);
  const auto* from = static_cast<const unsigned char*>(source);
  if (options().late_copies) {
    // A read before the wait must not find what an earlier stage left there.
    std::memset(to, 0xff, bytes);
  } else {
    std::memcpy(to, from, source_bytes);
    std::memset(to + source_bytes, 0, bytes - source_bytes);
  }
  thread.copies.push_back({to, from, bytes, source_bytes, thread.groups});
}

void copy_async_commit() { ++current().groups; }

void copy_async_wait(unsigned groups_left) {
  Thread& thread = current();
  if (thread.groups > groups_left) land(thread, thread.groups - groups_left);
}

void announce_atomic(void* address, unsigned bytes, const void* site) {
  judge::atomic(address, bytes, site);
  tsan::atomic(address, bytes, sync_words.back().fenced);
}

void fence() {
  judge::fence();
  sync_words.back().fenced = true;
}

void wait_for_grid_before() {
  current().waited = true;
  judge::wait_for_grid_before();
}

cudaError_t run(const Kernel& started, dim3 grid, dim3 block, std::size_t shared_bytes,
                bool behind) {
  const uint64_t count = uint64_t{block.x} * block.y * block.z;
  if (count == 0 || count > kMaxThreads || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  num_threads = static_cast<unsigned>(count);
  place.block_size = block;
  place.grid_size = grid;
  kernel = &started;
  is_behind = behind;
  failed = false;
  std::mt19937_64 random(options().seed);
  judge::begin_launch(behind);
  begin_fibers();
  const uint64_t num_blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool shuffled = options().blocks == Order::kShuffled && num_blocks < (1u << 20);
  std::vector<unsigned> blocks;
  if (shuffled) blocks = permutation(num_blocks, Order::kShuffled, random);
  for (uint64_t i = 0; i < num_blocks && !failed; ++i) {
    const uint64_t b = shuffled                              ? blocks[i]
                       : options().blocks == Order::kForward ? i
                                                             : num_blocks - 1 - i;
    place.block = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                   static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(shared_bytes, random);
  }
  judge::end_launch();
  // Only the end of a launch orders its blocks before what follows.
  tsan::acquire(&launch_word);
  free_block_memory();
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulation
