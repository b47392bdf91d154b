// How linear_packed goes over panels of every kind, with rows of x in registers.
//
// For any number of rows, sums are chains of a fixed number of steps of a panel, added up in order,
// so a row's bits do not depend on other rows. If the rows need several passes, a chain's share of
// the panel stays in the core's cache until all passes have used it; meanwhile the next share is
// prefetched. One or two rows read two panels at the same time, because a single stream of reads
// does not use all the requests that a core can have in flight.
#pragma once

#include "cpu/kernels.h"
#include "cpu/linear_panels.h"

namespace baton::cpu::BATON_ISA {

constexpr int kPanelVectors = kPanelOutputs / kLanes;
constexpr int kPartVectors = kPanelVectors / kPackedParts;
// Registers for sums, of 32 or 16; the others hold a step's vectors of weights and a factor.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 24, kMaxRows = 8, kPanelsOfFewRows = 2;
#else
constexpr int kMaxVectors = 12, kMaxRows = 4, kPanelsOfFewRows = 1;
#endif
constexpr int kFewRows = 2;

template <typename P>
int64_t num_panel_steps(const LinearPackedParams& p) {
  return (p.in_features + P::kTerms - 1) / P::kTerms;
}

// A chain: steps [begin, end), rows of x from `row` on, outputs from `vector` of `panel` on. It
// prefetches what comes next: `ahead_lines` lines every kUnroll steps, beginning `ahead` bytes
// after its first step.
struct Chain {
  int64_t panel, vector, row, begin, end;
  int64_t ahead, ahead_lines;
};

// The weights of a chain: kVectors vectors from each of kPanels panels of kind P.
template <typename P, int kPanels, int kVectors>
class ChainWeights {
 public:
  static constexpr int kAll = kPanels * kVectors;
  static constexpr int kUnroll = 4;
  static constexpr int64_t kStepBytes = kPanelVectors * P::kVectorBytes;

  ChainWeights(const LinearPackedParams& p, const Chain& chain)
      : panel_bytes_(num_panel_steps<P>(p) * kStepBytes),
        weights_(static_cast<const char*>(p.panels) + chain.panel * panel_bytes_ +
                 chain.begin * kStepBytes + chain.vector * P::kVectorBytes),
        next_(weights_ + chain.ahead),
        lines_(chain.ahead_lines) {}

  // Adds the products of the next `count` steps with kRows rows of factors, `stride` apart.
  template <int kRows>
  BATON_INLINE void multiply(typename P::Sum (&sums)[kRows][kAll], int64_t count,
                             const typename P::Factor* factors, int64_t stride) {
    int64_t k = 0;
    for (; k + kUnroll <= count; k += kUnroll) {
      for (int64_t i = 0; i < lines_; ++i, next_ += 64) {
        BATON_UNROLL
        for (int g = 0; g < kPanels; ++g) __builtin_prefetch(next_ + g * panel_bytes_, 0, 2);
      }
      BATON_UNROLL
      for (int i = 0; i < kUnroll; ++i) step(sums, k + i, factors + (k + i) * P::kTerms, stride);
    }
    for (; k < count; ++k) step(sums, k, factors + k * P::kTerms, stride);
    weights_ += count * kStepBytes;
  }

 private:
  template <int kRows>
  BATON_INLINE void step(typename P::Sum (&sums)[kRows][kAll], int64_t k,
                         const typename P::Factor* factors, int64_t stride) const {
    const char* vectors[kAll];
    BATON_UNROLL
    for (int v = 0; v < kAll; ++v) {
      vectors[v] =
          weights_ + k * kStepBytes + v / kVectors * panel_bytes_ + v % kVectors * P::kVectorBytes;
    }
    P::step(sums, vectors, factors, stride);
  }

  const int64_t panel_bytes_;
  const char* weights_;
  const char* next_;
  const int64_t lines_;
};

// A block of rows of x. P is a kind of panel with
//   static void add<kRows, kPanels, kVectors>(const LinearPackedParams&, const Chain&, Vec*
//   results)
// which adds a chain's sums to results, [row][vector], or sets them if it is the first chain.
template <typename P>
class PackedRows {
 public:
  PackedRows(const LinearPackedParams& p, int64_t row, int64_t row_end)
      : p_(p), row_(row), num_rows_(row_end - row), num_steps_(num_panel_steps<P>(p)) {}

  // Panels [panel, panel_end).
  void panels(int64_t panel, int64_t panel_end) {
    if constexpr (kPanelsOfFewRows > 1) {
      if (num_rows_ <= kFewRows) {
        for (; panel + kPanelsOfFewRows <= panel_end; panel += kPanelsOfFewRows) {
          columns<kPanelsOfFewRows, kPanelVectors>(panel, 0);
        }
      }
    }
    for (; panel < panel_end; ++panel) {
      if (num_rows_ * kPanelVectors <= kMaxVectors || kPackedParts == kPanelVectors) {
        columns<1, kPanelVectors>(panel, 0);
      } else {
        for (int64_t i = 0; i < kPackedParts; ++i) part(panel, i);
      }
    }
  }

  void part(int64_t panel, int64_t index) { columns<1, kPartVectors>(panel, index * kPartVectors); }

 private:
  // All rows by kVectors vectors, beginning with `vector`, of each of kPanels panels.
  template <int kPanels, int kVectors>
  void columns(int64_t panel, int64_t vector) {
    typedef ChainWeights<P, kPanels, kVectors> Weights;
    constexpr int kAll = Weights::kAll;
    // The smallest tile is one row by kAll vectors.
    constexpr int kFit = kMaxVectors / kAll / P::kVectorsPerSum;
    constexpr int kMost = kFit < 1 ? 1 : kFit < kMaxRows ? kFit : kMaxRows;
    constexpr int64_t kLinesOfSteps = Weights::kUnroll * Weights::kStepBytes / 64;
    const int64_t passes = (num_rows_ + kMost - 1) / kMost;
    int64_t begin = 0;
    do {
      const int64_t end = begin + P::kChainSteps < num_steps_ ? begin + P::kChainSteps : num_steps_;
      const int64_t bytes = (end - begin) * Weights::kStepBytes;
      Chain chain{panel, vector, row_, begin, end, p_.read_ahead, 0};
      if (passes > 1) {
        chain.ahead = bytes;
        chain.ahead_lines = (kLinesOfSteps + passes - 1) / passes;
      } else if (p_.read_ahead > 0) {
        chain.ahead_lines = kLinesOfSteps;
      }
      // Rows are spread evenly over the passes, and so are the prefetched lines of the next share.
      for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
        const int64_t count = (num_rows_ - row + passes - pass - 1) / (passes - pass);
        dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>(count, [&]<int kRows>() {
          if constexpr (kRows <= kMost) {
            P::template add<kRows, kPanels, kVectors>(p_, chain, results_ + row * kAll);
          }
        });
        row += count;
        chain.row += count;
        chain.ahead += chain.ahead_lines * ((end - begin) / Weights::kUnroll) * 64;
        if (passes > 1 && chain.ahead >= 2 * bytes) chain.ahead_lines = 0;
      }
      begin = end;
    } while (begin < num_steps_);
    for (int v = 0; v < kAll; ++v) {
      const int64_t output =
          (panel + v / kVectors) * kPanelOutputs + (vector + v % kVectors) * kLanes;
      write_results(p_, row_, num_rows_, output, results_ + v, kAll);
    }
  }

  const LinearPackedParams& p_;
  const int64_t row_, num_rows_, num_steps_;
  Vec results_[kPackedRowBlock * kPanelVectors];
};

// Work items [begin, end) of linear_packed; Rows is PackedRows or PackedTiles.
template <typename Rows>
void multiply_panels(const LinearPackedParams& p, int64_t begin, int64_t end) {
  const int64_t items = num_panels(p.out_features) * p.parts;
  while (begin < end) {
    const int64_t row = begin / items * kPackedRowBlock;
    const int64_t row_end = row + kPackedRowBlock < p.num_rows ? row + kPackedRowBlock : p.num_rows;
    int64_t item = begin % items;
    const int64_t last = item + end - begin < items ? item + end - begin : items;
    begin += last - item;
    Rows rows(p, row, row_end);
    // Parts of a panel, then whole panels, then parts of another one.
    for (; item < last && item % p.parts > 0; ++item) rows.part(item / p.parts, item % p.parts);
    const int64_t panel = item / p.parts, panel_end = last / p.parts;
    if (panel < panel_end) {
      rows.panels(panel, panel_end);
      item = panel_end * p.parts;
    }
    for (; item < last; ++item) rows.part(item / p.parts, item % p.parts);
  }
}

}  // namespace baton::cpu::BATON_ISA
