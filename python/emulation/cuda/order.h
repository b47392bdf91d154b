// Vector clocks for the judge: a thread of a block keeps a count for each other thread, and knows
// that the actions before that count have happened.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "emulation/cuda/runtime.h"

namespace emulation::judge {

class Order {
  using Counts = std::vector<uint32_t>;  // [thread]

  unsigned threads_ = 0;
  std::vector<Counts> known_;   // [thread]
  std::vector<Counts> fenced_;  // [thread]: and a proxy fence has come after it; empty without one
  // An mbarrier's clocks: of the running phase, and of those that have ended.
  struct Word {
    Counts known[2], fenced[2];
  };
  std::map<const void*, Word> words_;

  static void join(Counts& to, const Counts& from) {
    if (to.size() < from.size()) to.resize(from.size(), 0);
    for (std::size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }
  // Everybody whose bit is set learns what the others know.
  void join_all(std::vector<Counts>& of, unsigned first, uint64_t count, auto&& takes_part) {
    if (of.empty()) return;
    Counts all(threads_, 0);
    for (unsigned i = first; i < first + count; ++i) {
      if (takes_part(i)) join(all, of[i]);
    }
    for (unsigned i = first; i < first + count; ++i) {
      if (takes_part(i)) of[i] = all;
    }
  }

 public:
  void begin(unsigned threads) {
    threads_ = threads;
    known_.assign(threads, Counts(threads, 0));
    fenced_.clear();
    words_.clear();
  }

  uint32_t clock(unsigned thread) const { return known_[thread][thread]; }
  bool knows(unsigned thread, unsigned other, uint32_t clock) const {
    return clock < known_[thread][other];
  }
  bool is_fenced(unsigned thread, unsigned other, uint32_t clock) const {
    return !fenced_.empty() && clock < fenced_[thread][other];
  }

  void sync_warp(unsigned first, unsigned mask) {
    const auto takes_part = [&](unsigned i) { return mask >> (i - first) & 1; };
    const unsigned count = std::min(kWarpSize, threads_ - first);
    for (unsigned i = first; i < first + count; ++i) known_[i][i] += takes_part(i);
    join_all(known_, first, count, takes_part);
    join_all(fenced_, first, count, takes_part);
  }
  // Accesses have the number of barriers with them; what has been fenced has not.
  void sync_block() {
    const auto everybody = [](unsigned) { return true; };
    if (!fenced_.empty()) join_all(fenced_, 0, threads_, everybody);
  }

  void release(unsigned thread, const void* word) {
    ++known_[thread][thread];
    Word& w = words_[word];
    join(w.known[0], known_[thread]);
    if (!fenced_.empty()) join(w.fenced[0], fenced_[thread]);
  }
  void end_phase(const void* word) {
    Word& w = words_[word];
    join(w.known[1], w.known[0]);
    join(w.fenced[1], w.fenced[0]);
    w.known[0].clear();
    w.fenced[0].clear();
  }
  void acquire(unsigned thread, const void* word) {
    const Word& w = words_[word];
    join(known_[thread], w.known[1]);
    if (!fenced_.empty()) join(fenced_[thread], w.fenced[1]);
  }

  void fence(unsigned thread) {
    if (fenced_.empty()) fenced_.assign(threads_, Counts(threads_, 0));
    ++known_[thread][thread];
    join(fenced_[thread], known_[thread]);
  }
};

}  // namespace emulation::judge
