// linear_packed on the CPU: y = x weight^T + bias from panels of floats (common/linear_packed.h).
// int8: linear_packed_int8.cpp; bfloat16 on CPUs with AMX: linear_packed_amx.h.
#include "cpu/linear_packed_amx.h"
#include "cpu/linear_packed_rows.h"

namespace baton::cpu::BATON_ISA {

namespace {

template <typename T>
struct FloatPanel : Panel<T> {
  typedef Panel<T> P;
  typedef typename P::Factor Factor;
  typedef typename P::Input Input;
  static constexpr int kVectorsPerSum = 1;

  template <int kRows, int kPanels, int kVectors>
  static void add(const LinearPackedParams& p, const Chain& chain, Vec* results) {
    constexpr int kAll = kPanels * kVectors;
    ChainWeights<P, kPanels, kVectors> weights(p, chain);
    Vec sums[kRows][kAll];
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      BATON_UNROLL
      for (int v = 0; v < kAll; ++v) sums[m][v] = zero();
    }

    const int64_t first = chain.begin * P::kTerms, stride = p.x_row_stride;
    const int64_t last =
        chain.end * P::kTerms < p.in_features ? chain.end * P::kTerms : p.in_features;
    const int64_t num_factors = last - first;
    const Input* x = static_cast<const Input*>(p.x) + chain.row * stride + first;
    if constexpr (__is_same(Input, Factor)) {
      const int64_t whole = num_factors / P::kTerms;
      weights.multiply(sums, whole, x, stride);
      if (whole < chain.end - chain.begin) {
        // An odd number of elements leaves half a pair; what follows in memory belongs to another
        // row.
        Factor pairs[kRows][P::kTerms] = {};
        for (int m = 0; m < kRows; ++m) pairs[m][0] = x[m * stride + whole * P::kTerms];
        weights.multiply(sums, 1, pairs[0], P::kTerms);
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
      weights.multiply(sums, chain.end - chain.begin, converted[0], kMostFactors);
    }

    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      BATON_UNROLL
      for (int v = 0; v < kAll; ++v, ++results) {
        *results = chain.begin > 0 ? *results + sums[m][v] : sums[m][v];
      }
    }
  }
};

template <typename T>
struct RowsOf {
  typedef PackedRows<FloatPanel<T>> Type;
};
#if defined(BATON_HAS_TILES)
template <>
struct RowsOf<BFloat16> {
  typedef PackedTiles<Panel<BFloat16>> Type;
};
#endif

}  // namespace

void linear_packed(const LinearPackedParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype,
                 [&]<typename T>() { multiply_panels<typename RowsOf<T>::Type>(p, begin, end); });
}

}  // namespace baton::cpu::BATON_ISA
