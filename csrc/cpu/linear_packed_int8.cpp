// linear_packed for int8 panels on the CPU: rows of x are rounded to int8 with a scale per group of
// elements, the sums within a group are exact, and groups are added up in float32
// (common/linear_packed.h). On CPUs with AMX: linear_packed_amx.h.
#include "cpu/linear_packed_amx.h"
#include "cpu/linear_packed_rows.h"

namespace baton::cpu::BATON_ISA {

namespace {

struct GroupedInt8Panel : Int8Panel {
  // A group's sums, and the totals of all groups so far. Both stay in registers: scaling and adding
  // in memory was a fifth slower, because products wait for it.
  static constexpr int kVectorsPerSum = 2;

  template <int kRows, int kPanels, int kVectors>
  static void add(const LinearPackedParams& p, const Chain& chain, Vec* results) {
    constexpr int kAll = kPanels * kVectors;
    ChainWeights<Int8Panel, kPanels, kVectors> weights(p, chain);
    const int64_t num_groups = num_int8_groups(p.in_features), stride = p.x_row_stride;
    const QuantizedGroup* group = p.x_groups + chain.row * num_groups + chain.begin / kGroupSteps;
    // Rows are padded with zeros, which the last group multiplies if it is not whole.
    const int8_t* x = static_cast<const int8_t*>(p.x) + chain.row * stride + chain.begin * kTerms;
    Vec totals[kRows][kAll];
    BATON_UNROLL
    for (int m = 0; m < kRows; ++m) {
      BATON_UNROLL
      for (int v = 0; v < kAll; ++v) {
        totals[m][v] = chain.begin > 0 ? results[m * kAll + v] : zero();
      }
    }
    for (int64_t k = chain.begin; k < chain.end; k += kGroupSteps, ++group, x += kInt8Group) {
      IntVec sums[kRows][kAll];
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        BATON_UNROLL
        for (int v = 0; v < kAll; ++v) sums[m][v] = group[m * num_groups].first_sum - IntVec{};
      }
      const int64_t rest = chain.end - k;
      weights.multiply(sums, rest < kGroupSteps ? rest : kGroupSteps, x, stride);
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        BATON_UNROLL
        for (int v = 0; v < kAll; ++v) {
          totals[m][v] = totals[m][v] + scaled(sums[m][v], group[m * num_groups]);
        }
      }
    }

    const bool is_last = chain.end == num_panel_steps<Int8Panel>(p);
    BATON_UNROLL
    for (int v = 0; v < kAll; ++v) {
      const int64_t output =
          (chain.panel + v / kVectors) * kPanelOutputs + (chain.vector + v % kVectors) * kLanes;
      const Vec scales = is_last ? load_scales(p, output) : zero();
      BATON_UNROLL
      for (int m = 0; m < kRows; ++m) {
        results[m * kAll + v] = is_last ? with_scales(totals[m][v], scales) : totals[m][v];
      }
    }
  }
};

}  // namespace

void linear_packed_int8(const LinearPackedParams& p, int64_t begin, int64_t end) {
#if defined(BATON_HAS_TILES)
  multiply_panels<PackedTiles<Int8Panel>>(p, begin, end);
#else
  multiply_panels<PackedRows<GroupedInt8Panel>>(p, begin, end);
#endif
}

}  // namespace baton::cpu::BATON_ISA
