#include "cpu/host/team.h"

#include <pthread.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu/host/float_mode.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace baton::cpu {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;

// How long a helper spins for the next region. Between two regions of a decode step lie 5 to 30 us.
constexpr microseconds kSpin{50};
// How long a caller spins for a helper that is still inside a region.
constexpr microseconds kPatience{100};
// A helper that was preempted for this long shares its core with another program and stays away.
// Shorter preemptions are ordinary. Under a hypervisor elapsed time by itself proves nothing.
constexpr microseconds kPreempted{500};
// How long it stays away; the time doubles with each preemption that follows soon after.
constexpr microseconds kFirstAbsence{5'000}, kLastAbsence{40'000};

// Sleeps if `word` still has this value. May return early.
void sleep_while(std::atomic<uint32_t>& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

// Wakes up to `count` sleeping threads; the word has been changed before.
void wake(std::atomic<uint32_t>& word, int count) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  for (int i = 0; i < count; ++i) word.notify_one();
#endif
}

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// How often the system has preempted this thread.
long preemptions() {
#if defined(__linux__)
  rusage usage;
  return getrusage(RUSAGE_THREAD, &usage) == 0 ? usage.ru_nivcsw : 0;
#else
  return 0;
#endif
}

// Changes in a forked process: threads do not survive a fork.
std::atomic<uint32_t> process_number{1};

// The state of a region in one word, so that a helper enters only while it is open: free seats,
// helpers inside, whether the caller sleeps until they have left, and the region's number.
constexpr uint64_t kSeat = 1, kSeats = 0xffff;
constexpr uint64_t kInside = 1 << 16, kInsides = 0x7fff * kInside;
constexpr uint64_t kCallerSleeps = uint64_t{1} << 31;
constexpr int kNumberShift = 32;
constexpr int kMaxHelpers = 0x7fff;

uint32_t number_of(uint64_t region) { return static_cast<uint32_t>(region >> kNumberShift); }

// A calling thread's helpers. Never destroyed: they may run as long as the process does.
class Team {
 public:
  void run(int helpers, bool wakes, TeamWork work, const void* argument) {
    start(std::min(helpers, kMaxHelpers));
    const int present = num_helpers_ - absent_.load(std::memory_order_relaxed);
    const int awake = present - sleeping_.load(std::memory_order_relaxed);
    const int seats = std::min(helpers, wakes ? present : awake);
    if (seats <= 0) return work(argument);

    work_ = work;
    argument_ = argument;
    float_mode_ = float_mode();
    const uint64_t number = number_of(region_.load(std::memory_order_relaxed)) + uint64_t{1};
    region_.store(number << kNumberShift | static_cast<uint64_t>(seats), std::memory_order_seq_cst);
    if (wakes) wake_helpers(seats, present);
    work(argument);
    close();
  }

 private:
  void start(int helpers) {
    const uint32_t process = process_number.load(std::memory_order_relaxed);
    if (process != process_) {
      // The helpers known here belong to the process that this one was forked from.
      region_ = 0;
      sleeping_ = absent_ = 0;
      num_helpers_ = 0;
      can_start_ = true;
      process_ = process;
    }
    if (num_helpers_ >= helpers || !can_start_) return;
    // Signals go to the program's own threads, except those that an instruction raises. Linux keeps
    // a mask per thread; pthread_sigmask, the same call, is a symbol of glibc 2.32 (and
    // pthread_setname_np below one of 2.34), which a manylinux_2_28 wheel may not need.
    sigset_t all, before;
    sigfillset(&all);
    for (const int raised : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP}) sigdelset(&all, raised);
    sigprocmask(SIG_SETMASK, &all, &before);
    try {
      for (; num_helpers_ < helpers; ++num_helpers_) std::thread([this] { help(); }).detach();
    } catch (const std::system_error&) {
      // The process may start no more threads: make do with those that it has.
      can_start_ = false;
    } catch (const std::bad_alloc&) {
      // Make do with those that have started until there is memory.
    }
    sigprocmask(SIG_SETMASK, &before, nullptr);
  }

  // Either a helper that is about to sleep sees the open region, or the caller sees it asleep.
  void wake_helpers(int seats, int present) {
    const int asleep = sleeping_.load(std::memory_order_seq_cst);
    const int missing = seats - (present - asleep);
    if (asleep <= 0 || missing <= 0) return;
    call_.fetch_add(1, std::memory_order_seq_cst);
    wake(call_, missing);
  }

  // Lets no more helpers enter and waits for those inside.
  void close() {
    uint64_t region = region_.fetch_and(~kSeats, std::memory_order_acq_rel);
    if ((region & kInsides) == 0) return;
    const Clock::time_point begin = Clock::now();
    while (Clock::now() - begin < kPatience) {
      region = region_.load(std::memory_order_acquire);
      if ((region & kInsides) == 0) return;
      pause();
    }
    // Sleep, so that the helper can use this core if another program occupies its own.
    waits_since_.store(begin, std::memory_order_relaxed);
    uint32_t left = left_.load(std::memory_order_acquire);
    region = region_.fetch_or(kCallerSleeps, std::memory_order_acq_rel);
    while ((region & kInsides) != 0) {
      sleep_while(left_, left);
      left = left_.load(std::memory_order_acquire);
      region = region_.load(std::memory_order_acquire);
    }
  }

  void help() {
#if defined(__linux__)
    prctl(PR_SET_NAME, "baton-helper");
#endif
    uint32_t last_number = 0;
    Absence absence;
    for (;;) {
      uint64_t region = wait_for_region(last_number, absence);
      if (!region_.compare_exchange_strong(region, region - kSeat + kInside,
                                           std::memory_order_acquire)) {
        continue;
      }
      last_number = number_of(region);
      if (float_mode_ != float_mode()) set_float_mode(float_mode_);
      work_(argument_);
      region = region_.fetch_sub(kInside, std::memory_order_acq_rel);
      if ((region & kCallerSleeps) != 0 && (region & kInsides) == kInside) {
        const Clock::time_point since = waits_since_.load(std::memory_order_relaxed);
        left_.fetch_add(1, std::memory_order_release);
        wake(left_, 1);
        if (Clock::now() - since > kPreempted) absence.take_if_preempted(*this);
      }
    }
  }

  // The time that a helper stays away because another program uses its core.
  class Absence {
   public:
    void take_if_preempted(Team& team) {
      const long count = preemptions();
      if (count == count_) return;
      const Clock::time_point now = Clock::now();
      // Soon after the last preemption: the other program is still there.
      length_ = now - end_ < length_ ? std::min(2 * length_, kLastAbsence) : kFirstAbsence;
      team.absent_.fetch_add(1, std::memory_order_relaxed);
      std::this_thread::sleep_for(length_);
      team.absent_.fetch_sub(1, std::memory_order_relaxed);
      end_ = Clock::now();
      forget();
    }

    // Preemptions until now no longer count.
    void forget() { count_ = preemptions(); }

   private:
    long count_ = preemptions();
    microseconds length_ = kFirstAbsence;
    Clock::time_point end_{};
  };

  // Returns the state of an open region that this helper has not been in.
  uint64_t wait_for_region(uint32_t last_number, Absence& absence) {
    const auto is_open = [&](uint64_t region) {
      return (region & kSeats) != 0 && number_of(region) != last_number;
    };
    uint64_t region = region_.load(std::memory_order_acquire);
    Clock::time_point last = Clock::now(), end = last + kSpin;
    for (; !is_open(region); region = region_.load(std::memory_order_acquire)) {
      pause();
      Clock::time_point now = Clock::now();
      if (now - last > kPreempted) {
        absence.take_if_preempted(*this);
        now = Clock::now();
      }
      last = now;
      if (now < end) continue;
      sleeping_.fetch_add(1, std::memory_order_seq_cst);
      const uint32_t call = call_.load(std::memory_order_seq_cst);
      if (!is_open(region_.load(std::memory_order_seq_cst))) sleep_while(call_, call);
      sleeping_.fetch_sub(1, std::memory_order_seq_cst);
      absence.forget();
      last = Clock::now();
      end = last + kSpin;
    }
    return region;
  }

  // Written by the caller before it opens a region.
  TeamWork work_ = nullptr;
  const void* argument_ = nullptr;
  uint64_t float_mode_ = 0;
  // Used by the caller only.
  int num_helpers_ = 0;
  bool can_start_ = true;
  uint32_t process_ = 0;
  // Each on its own cache line: helpers read one while the others change.
  alignas(64) std::atomic<uint64_t> region_{0};
  alignas(64) std::atomic<uint32_t> call_{0};  // helpers sleep on it, the caller changes it
  std::atomic<int> sleeping_{0}, absent_{0};
  alignas(64) std::atomic<uint32_t> left_{
      0};  // the caller sleeps on it, the last helper changes it
  std::atomic<Clock::time_point> waits_since_{};
};

// Teams whose calling thread has ended.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = [] {
      Pool* made = new Pool;  // outlives every thread
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] {
                       instance().mutex_.unlock();
                       process_number.fetch_add(1, std::memory_order_relaxed);
                     });
      return made;
    }();
    return *pool;
  }

  Team* take() {
    const std::lock_guard lock(mutex_);
    if (free_.empty()) {
      // Reserves the room to give it back: a thread that ends must not fail for lack of memory.
      free_.reserve(num_teams_ + 1);
      Team* made = new Team;
      ++num_teams_;
      return made;
    }
    Team* team = free_.back();
    free_.pop_back();
    return team;
  }

  void give_back(Team* team) {
    const std::lock_guard lock(mutex_);
    free_.push_back(team);
  }

 private:
  std::mutex mutex_;
  std::vector<Team*> free_;
  size_t num_teams_ = 0;
};

struct Lease {
  Team* team = Pool::instance().take();
  ~Lease() { Pool::instance().give_back(team); }
};

}  // namespace

void run_on_team(int helpers, bool wakes, TeamWork work, const void* argument) noexcept {
  Team* team;
  try {
    thread_local Lease lease;
    team = lease.team;
  } catch (const std::bad_alloc&) {
    return work(argument);  // no memory for a team: without helpers
  }
  team->run(helpers, wakes, work, argument);
}

}  // namespace baton::cpu
