// Calls of run_on_team for a sanitizer to watch, and checks of its guarantees: each item of every
// region is done once, with concurrent callers, with any number of helpers, in a forked process,
// and in the caller's float mode. Prints nothing and returns 0, or prints what is wrong.
#include "cpu/host/team.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "team: %s\n", what);
  std::exit(1);
}

// A region of counted items; plain integers, so that a sanitizer reports two threads at one item.
struct Region {
  std::vector<int> done;
  std::atomic<size_t> next{0};
  std::chrono::microseconds item{0};

  explicit Region(size_t items) : done(items) {}

  void run(int helpers, bool wakes) {
    next = 0;
    baton::cpu::run_on_team(
        helpers, wakes,
        [](const void* argument) {
          Region& region = *const_cast<Region*>(static_cast<const Region*>(argument));
          for (size_t i; (i = region.next.fetch_add(1)) < region.done.size();) {
            if (region.item.count() > 0) std::this_thread::sleep_for(region.item);
            ++region.done[i];
          }
        },
        this);
  }
};

void many_regions(int rounds, int seed) {
  Region region(37);
  for (int round = 1; round <= rounds; ++round) {
    const int helpers[] = {1, 3, 0, 7, 2};
    region.run(helpers[(round + seed) % 5], round % 3 != 0);
    for (const int count : region.done) check(count == round, "an item was not done once");
    // Helpers fall asleep between some regions, and are about to between others.
    if (round % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(10 * (round % 11)));
  }
}

void several_callers() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) callers.emplace_back([i] { many_regions(500, i); });
  many_regions(500, 4);
  for (std::thread& caller : callers) caller.join();
}

// Items that take so long that the caller sleeps before the last helper has left.
void slow_items() {
  Region region(4);
  region.item = std::chrono::milliseconds(2);
  for (int round = 1; round <= 5; ++round) {
    region.run(3, true);
    for (const int count : region.done) check(count == round, "a slow item was not done once");
  }
}

int num_threads() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    int count;
    if (word == "Threads:" && status >> count) return count;
  }
  return 0;
}

// Short-lived threads use the same helpers.
void short_lived_callers() {
  std::thread([] { many_regions(5, 3); }).join();
  const int before = num_threads();
  for (int i = 0; i < 20; ++i) std::thread([] { many_regions(5, 3); }).join();
  check(num_threads() <= before, "threads that have ended left helpers behind");
}

void float_mode() {
#if defined(__x86_64__)
  struct Sums {
    volatile float tiny = 1e-39f;
    std::atomic<int> calls{0}, flushed{0};
  } sums;
  const auto count = [](const void* argument) {
    Sums& sums = *const_cast<Sums*>(static_cast<const Sums*>(argument));
    ++sums.calls;
    if (sums.tiny * 0.5f == 0.0f) ++sums.flushed;
    // Long enough for the others to come.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  const unsigned before = _mm_getcsr();
  int most = 0;
  for (int round = 0; round < 40; ++round) {
    const bool flushes = round % 2 == 0;
    _mm_setcsr(flushes ? before | 0x8040u : before & ~0x8040u);
    sums.calls = sums.flushed = 0;
    baton::cpu::run_on_team(3, true, count, &sums);
    most = std::max(most, sums.calls.load());
    check(sums.flushed == (flushes ? sums.calls.load() : 0), "a helper has another float mode");
  }
  _mm_setcsr(before);
  check(most > 1, "no helper came");
#endif
}

void idle_helpers_sleep() {
  many_regions(10, 0);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto cpu_us = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return (usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) * 1000000 + usage.ru_utime.tv_usec +
           usage.ru_stime.tv_usec;
  };
  const auto before = cpu_us();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  check(cpu_us() - before < 50000, "idle helpers do not sleep");
}

void fork_process([[maybe_unused]] int generations) {
  // The thread sanitizer does not start threads in a forked process.
#if !defined(__SANITIZE_THREAD__)
  const pid_t child = fork();
  if (child == 0) {
    many_regions(50, generations);
    if (generations > 1) fork_process(generations - 1);
    std::_Exit(0);
  }
  int status = 1;
  waitpid(child, &status, 0);
  check(status == 0, "a forked process failed");
  many_regions(5, generations);
#endif
}

}  // namespace

int main() {
  several_callers();
  slow_items();
  short_lived_callers();
  float_mode();
  idle_helpers_sleep();
  fork_process(2);
  // Ends while helpers spin, and another thread runs regions.
  std::thread([] { many_regions(1 << 30, 0); }).detach();
  many_regions(3, 0);
}
