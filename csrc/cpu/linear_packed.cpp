// linear_packed on the CPU: y = x weight^T + bias from panels (common/linear_packed.h). bfloat16
// and int8 on CPUs with AMX: linear_packed_amx.h.
//
// Sums are chains of so many steps of a panel, added up in their order, for every number of rows: a
// row's bits are its own. Where rows take several passes, a chain's share of a panel stays in the
// core's cache until all of them have met it, and the next share is asked for meanwhile. Up to two
// rows read two panels side by side: one stream of reads is less than a core can have under way.
#include "cpu/kernels.h"
#include "cpu/linear_packed_amx.h"
#include "cpu/linear_panels.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Steps between two requests for what comes next.
constexpr int kUnroll = 4;
constexpr int kPanelVectors = kPanelOutputs / kLanes;
constexpr int kPartVectors = kPanelVectors / kPackedParts;
// Of 32 or 16 registers: sums, a step's vectors of weights and a factor.
#if defined(__AVX512F__)
constexpr int kMaxSums = 24, kMaxRows = 8, kPanelsOfFewRows = 2;
#else
constexpr int kMaxSums = 12, kMaxRows = 4, kPanelsOfFewRows = 1;
#endif
constexpr int kFewRows = 2;

// What a chain asks for while it multiplies: `lines` lines each kUnroll steps, from `distance`
// bytes beyond its first step on.
struct ReadAhead {
  int64_t distance, lines;
};

// A block of rows of x; P is a kind of panels.
template <typename P>
class PackedRows {
 public:
  PackedRows(const LinearPackedParams& p, int64_t row, int64_t row_end)
      : p_(p),
        row_(row),
        num_rows_(row_end - row),
        num_steps_((p.in_features + P::kTerms - 1) / P::kTerms),
        // Rows of int8 go on with zeros.
        row_size_(kInt8 ? num_steps_ * P::kTerms : p.in_features),
        panel_bytes_(num_steps_ * kStepBytes) {}

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
      if (num_rows_ * kPanelVectors <= kMaxSums || kPackedParts == kPanelVectors) {
        columns<1, kPanelVectors>(panel, 0);
      } else {
        for (int64_t i = 0; i < kPackedParts; ++i) part(panel, i);
      }
    }
  }

  void part(int64_t panel, int64_t index) { columns<1, kPartVectors>(panel, index * kPartVectors); }

 private:
  typedef typename P::Factor Factor;
  typedef typename P::Sum Sum;
  typedef typename P::Input Input;
  typedef typename P::Output Output;
  static constexpr bool kInt8 = __is_same(Input, int8_t);
  static constexpr int64_t kStepBytes = kPanelVectors * P::kVectorBytes;
  static constexpr int64_t kLinesOfSteps = kUnroll * kStepBytes / 64;

  // All rows by kVectors vectors, from `vector` on, of each of kPanels panels.
  template <int kPanels, int kVectors>
  void columns(int64_t panel, int64_t vector) {
    constexpr int kMost =
        kMaxSums / (kPanels * kVectors) < kMaxRows ? kMaxSums / (kPanels * kVectors) : kMaxRows;
    const int64_t passes = (num_rows_ + kMost - 1) / kMost;
    int64_t begin = 0;
    do {
      const int64_t end = begin + P::kChainSteps < num_steps_ ? begin + P::kChainSteps : num_steps_;
      const int64_t bytes = (end - begin) * kStepBytes;
      ReadAhead ahead{p_.read_ahead, p_.read_ahead > 0 ? kLinesOfSteps : 0};
      if (passes > 1) ahead = {bytes, (kLinesOfSteps + passes - 1) / passes};
      // Rows are spread evenly over passes, and so are the lines of the next share.
      for (int64_t pass = 0, row = 0; pass < passes; ++pass) {
        const int64_t count = (num_rows_ - row + passes - pass - 1) / (passes - pass);
        dispatch_int<1, 2, 3, 4, 5, 6, 7, 8>(count, [&]<int kRows>() {
          if constexpr (kRows <= kMost) {
            chain<kRows, kPanels, kVectors>(panel, vector, row, begin, end, ahead);
          }
        });
        row += count;
        ahead.distance += ahead.lines * ((end - begin) / kUnroll) * 64;
        if (passes > 1 && ahead.distance >= 2 * bytes) ahead.lines = 0;
      }
      begin = end;
    } while (begin < num_steps_);
  }

  // Steps [begin, end) for rows [row, row + kRows) of the block.
  template <int kRows, int kPanels, int kVectors>
  void chain(int64_t panel, int64_t vector, int64_t row, int64_t begin, int64_t end,
             ReadAhead ahead) {
    constexpr int kAll = kPanels * kVectors;
    const char* weights = static_cast<const char*>(p_.panels) + panel * panel_bytes_ +
                          begin * kStepBytes + vector * P::kVectorBytes;
    const char* next = weights + ahead.distance;
    Sum sums[kRows][kAll];
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      BATON_UNROLL
      for (int v = 0; v < kAll; ++v) sums[m][v] = Sum{};
    }
    const auto step = [&](int64_t k, const Factor* factors, int64_t stride) BATON_INLINE_LAMBDA {
      const char* vectors[kAll];
      BATON_UNROLL
      for (int v = 0; v < kAll; ++v) {
        vectors[v] =
            weights + k * kStepBytes + v / kVectors * panel_bytes_ + v % kVectors * P::kVectorBytes;
      }
      P::step(sums, vectors, factors, stride);
    };
    const auto steps = [&](int64_t count, const Factor* factors, int64_t stride)
                           BATON_INLINE_LAMBDA {
                             int64_t k = 0;
                             for (; k + kUnroll <= count; k += kUnroll) {
                               for (int64_t i = 0; i < ahead.lines; ++i, next += 64) {
                                 BATON_UNROLL
                                 for (int g = 0; g < kPanels; ++g)
                                   __builtin_prefetch(next + g * panel_bytes_, 0, 2);
                               }
                               BATON_UNROLL
                               for (int i = 0; i < kUnroll; ++i)
                                 step(k + i, factors + (k + i) * P::kTerms, stride);
                             }
                             for (; k < count; ++k) step(k, factors + k * P::kTerms, stride);
                           };

    const int64_t first = begin * P::kTerms, stride = p_.x_row_stride;
    const int64_t last = end * P::kTerms < row_size_ ? end * P::kTerms : row_size_;
    const int64_t num_factors = last - first;
    const Input* x = static_cast<const Input*>(p_.x) + (row_ + row) * stride + first;
    if constexpr (__is_same(Input, Factor)) {
      const int64_t whole = num_factors / P::kTerms;
      steps(whole, x, stride);
      if (whole < end - begin) {
        // Half of a pair: what follows in memory is not this row's.
        Factor pairs[kRows][P::kTerms] = {};
        for (int m = 0; m < kRows; ++m) pairs[m][0] = x[m * stride + whole * P::kTerms];
        step(whole, pairs[0], P::kTerms);
      }
    } else {
      constexpr int64_t kMostFactors = P::kChainSteps * P::kTerms;
      alignas(64) Factor converted[kRows][kMostFactors];
      for (int m = 0; m < kRows; ++m) {
        int64_t k = 0;
        for (; k + kLanes <= num_factors; k += kLanes) store(converted[m] + k, load(x + k));
        // The missing half of a pair is 0.
        if (k < num_factors) store(converted[m] + k, load_partial(x + k, num_factors - k));
        x += stride;
      }
      steps(end - begin, converted[0], kMostFactors);
    }

    Sum* const kept = kept_ + row * kAll;
    if (begin > 0) {
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        BATON_UNROLL
        for (int v = 0; v < kAll; ++v) sums[m][v] = kept[m * kAll + v] + sums[m][v];
      }
    }
    if (end < num_steps_) {
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        BATON_UNROLL
        for (int v = 0; v < kAll; ++v) kept[m * kAll + v] = sums[m][v];
      }
      return;
    }
    BATON_UNROLL
    for (int v = 0; v < kAll; ++v) {
      const int64_t output =
          (panel + v / kVectors) * kPanelOutputs + (vector + v % kVectors) * kLanes;
      const int64_t rest = p_.out_features - output;
      if (rest <= 0) continue;
      Vec bias = zero(), scales = zero();
      if (p_.bias) bias = load_some(static_cast<const Output*>(p_.bias) + output, rest);
      if constexpr (kInt8) scales = load_some(p_.weight_scales + output, rest);
      Output* y = static_cast<Output*>(p_.y) + (row_ + row) * p_.out_features + output;
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m, y += p_.out_features) {
        Vec result;
        if constexpr (kInt8) {
          const QuantizedRow& of_x = p_.x_scales[row_ + row + m];
          result = dequantized(sums[m][v] - kByteOffset * of_x.sum, of_x, scales);
        } else {
          result = sums[m][v];
        }
        store_some(y, p_.bias ? result + bias : result, rest);
      }
    }
  }

  const LinearPackedParams& p_;
  const int64_t row_, num_rows_, num_steps_, row_size_, panel_bytes_;
  // The sums of all chains but the last one, [row][vector].
  Sum kept_[kPackedRowBlock * kPanelVectors];
};

template <typename P>
struct RowsOf {
  typedef PackedRows<P> Type;
};
#if defined(BATON_HAS_TILES)
template <>
struct RowsOf<Panel<BFloat16>> {
  typedef PackedTiles<Panel<BFloat16>> Type;
};
template <typename T>
struct RowsOf<Int8Panel<T>> {
  typedef PackedTiles<Int8Panel<T>> Type;
};
#endif

template <typename P>
void run(const LinearPackedParams& p, int64_t begin, int64_t end) {
  const int64_t items = num_panels(p.out_features) * p.parts;
  while (begin < end) {
    const int64_t row = begin / items * kPackedRowBlock;
    const int64_t row_end = row + kPackedRowBlock < p.num_rows ? row + kPackedRowBlock : p.num_rows;
    int64_t item = begin % items;
    const int64_t last = item + end - begin < items ? item + end - begin : items;
    begin += last - item;
    typename RowsOf<P>::Type rows(p, row, row_end);
    // Parts of a panel, whole panels, parts of another one.
    for (; item < last && item % p.parts > 0; ++item) rows.part(item / p.parts, item % p.parts);
    const int64_t panel = item / p.parts, panel_end = last / p.parts;
    if (panel < panel_end) {
      rows.panels(panel, panel_end);
      item = panel_end * p.parts;
    }
    for (; item < last; ++item) rows.part(item / p.parts, item % p.parts);
  }
}

}  // namespace

void linear_packed(const LinearPackedParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    if (p.weight_scales) {
      run<Int8Panel<T>>(p, begin, end);
    } else {
      run<Panel<T>>(p, begin, end);
    }
  });
}

}  // namespace baton::cpu::BATON_ISA
