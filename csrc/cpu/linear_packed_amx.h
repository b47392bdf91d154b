// linear_packed for bfloat16 and int8 in AMX tiles. Rows of x are the first operand, straight from
// memory; a panel's pairs (or fours, for int8) are the second, as they lie. Six tiles hold sums: 32
// rows by one panel, or up to 16 rows by two.
//
// Every element is summed over steps of 32 in ascending order, no matter what shares its tile, so a
// row's bits do not depend on other rows. int8 sums over steps of 64, one group of x each, are
// exact; they leave their tiles after each step to be scaled and added up.
#pragma once

#include "common/linear_packed.h"
#include "cpu/kernels.h"
#include "cpu/linear_panels.h"
#include "cpu/simd/amx_products.h"

#if defined(BATON_HAS_TILES)

namespace baton::cpu::BATON_ISA {

// A block of rows of x. P is a kind of panel whose steps have 4 bytes per output.
template <typename P>
class PackedTiles {
 public:
  PackedTiles(const LinearPackedParams& p, int64_t row, int64_t row_end)
      : p_(p),
        row_(row),
        num_rows_(row_end - row),
        tile_rows_(num_rows_ < kAmxRows ? static_cast<int>(num_rows_) : kAmxRows),
        panel_bytes_((p.in_features + P::kTerms - 1) / P::kTerms * kPairBytes) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(tile == kPairs ? kAmxRows : tile_rows_);
      config.row_bytes[tile] = kAmxRowBytes;
    }
    tile_configure(config);
  }
  // If tiles stayed configured, every thread switch would save them.
  ~PackedTiles() { tile_release(); }
  PackedTiles(const PackedTiles&) = delete;
  PackedTiles& operator=(const PackedTiles&) = delete;

  // Panels [panel, panel_end).
  void panels(int64_t panel, int64_t panel_end) {
    if (num_rows_ <= kAmxRows) {
      for (; panel + 2 <= panel_end; panel += 2) columns<2, kPanelTiles>(panel, 0);
    }
    for (; panel < panel_end; ++panel) columns<1, kPanelTiles>(panel, 0);
  }

  void part(int64_t panel, int64_t index) { columns<1, 1>(panel, index); }

 private:
  typedef typename P::Input Input;
  static constexpr bool kInt8 = __is_same(Input, int8_t);
  static constexpr int kPanelTiles = kPanelOutputs / kAmxRows;
  static_assert(kPanelTiles == kPackedParts && kPackedRowBlock % (2 * kAmxRows) == 0);
  static constexpr int kRows = 6, kPairs = 7;  // the tiles of the two operands
  // Elements of a row in one tile, and the bytes of a panel's pairs or fours for one step.
  static constexpr int64_t kStep = kAmxRowBytes / static_cast<int64_t>(sizeof(Input));
  static constexpr int64_t kPairBytes = kPanelOutputs * 4;
  static constexpr int64_t kStepBytes = kAmxRows * kPairBytes;
  // How many steps before their use weights are prefetched.
  static constexpr int64_t kAheadSteps = 4;
  static_assert(!kInt8 || kStep == kInt8Group);

  // All rows by kTiles tiles, beginning with `tile`, of each of kPanels panels.
  template <int kPanels, int kTiles>
  void columns(int64_t panel, int64_t tile) {
    for (int64_t row = 0; row < num_rows_;) {
      // If there are at least 16 rows, the last tile has 16 as well: it repeats some rows.
      const int64_t second =
          row + 2 * kAmxRows <= num_rows_ ? row + kAmxRows : num_rows_ - kAmxRows;
      if constexpr (kPanels == 1) {
        if (num_rows_ - row > kAmxRows) {
          const int64_t rows[2] = {row, second};
          if (row == 0) {
            products<1, kTiles, 2, true>(panel, tile, rows);
          } else {
            products<1, kTiles, 2, false>(panel, tile, rows);
          }
          row += 2 * kAmxRows;
          continue;
        }
      }
      const int64_t rows[1] = {row + tile_rows_ <= num_rows_ ? row : num_rows_ - tile_rows_};
      products<kPanels, kTiles, 1, true>(panel, tile, rows);
      row += kAmxRows;
    }
  }

  // Sums of row tile i and of tile j of the panels are tile i * kPanels * kTiles + j.
  template <int kPanels, int kTiles, int kRowTiles, bool kAhead>
  void products(int64_t panel, int64_t tile, const int64_t (&rows)[kRowTiles]) {
    constexpr int kColumns = kPanels * kTiles;
    static_assert(kRowTiles * kColumns <= kRows);
    const char* pairs = static_cast<const char*>(p_.panels) + panel * panel_bytes_;
    const Input* x[kRowTiles];
    for (int i = 0; i < kRowTiles; ++i) {
      x[i] = static_cast<const Input*>(p_.x) + (row_ + rows[i]) * p_.x_row_stride;
    }
    // The 16 rows of each tile. For bfloat16 the tiles themselves hold the sums over all steps.
    Vec results[kRowTiles * kColumns][kAmxRows];
    const auto clear_tiles = [] {
      each_tile<kRowTiles * kColumns>([]<int kSum>() { tile_zero<kSum>(); });
    };
    if constexpr (kInt8) {
      for (auto& rows_of_tile : results) {
        for (Vec& row : rows_of_tile) row = zero();
      }
    } else {
      clear_tiles();
    }
    const auto add_group = [&](int64_t group) BATON_INLINE_LAMBDA {
      const int64_t num_groups = num_int8_groups(p_.in_features);
      each_tile<kRowTiles * kColumns>([&]<int kSum>() {
        alignas(64) IntVec sums[kAmxRows];
        tile_store<kSum>(sums, kAmxRowBytes);
        const QuantizedGroup* groups =
            p_.x_groups + (row_ + rows[kSum / kColumns]) * num_groups + group;
        for (int m = 0; m < tile_rows_; ++m, groups += num_groups) {
          results[kSum][m] = results[kSum][m] + Int8Panel::scaled(sums[m], *groups);
        }
      });
    };

    // One step: load_rows(i) and load_pairs(panel, tile) fill their tiles.
    const auto multiply_step = [&](int64_t step, auto&& load_rows,
                                   auto&& load_pairs) BATON_INLINE_LAMBDA {
      if constexpr (kInt8) clear_tiles();
      each_tile<kColumns>([&]<int kColumn>() {
        load_pairs(kColumn / kTiles, tile + kColumn % kTiles);
        // Alternating direction, so that the rows at each turn are loaded only once.
        each_tile<kRowTiles>([&]<int kTurn>() {
          constexpr int kRow = kColumn % 2 == 0 ? kTurn : kRowTiles - 1 - kTurn;
          if (kTurn > 0 || kColumn == 0) load_rows(kRow);
          if constexpr (kInt8) {
            tile_multiply_bytes<kRow * kColumns + kColumn, kRows, kPairs>();
          } else {
            tile_multiply<kRow * kColumns + kColumn, kRows, kPairs>();
          }
        });
      });
      if constexpr (kInt8) add_group(step);
    };
    const int64_t steps = p_.in_features / kStep;
    const int64_t x_bytes = p_.x_row_stride * static_cast<int64_t>(sizeof(Input));
    for (int64_t step = 0; step < steps; ++step, pairs += kStepBytes) {
      if constexpr (kAhead) {
        const char* next = pairs + kAheadSteps * kStepBytes;
        for (int g = 0; g < kPanels; ++g, next += panel_bytes_) {
          for (int64_t i = 0; i < kStepBytes; i += 64) __builtin_prefetch(next + i, 0, 2);
        }
      }
      multiply_step(
          step, [&](int i) { tile_load<kRows>(x[i] + step * kStep, x_bytes); },
          [&](int g, int64_t t) {
            tile_load<kPairs>(pairs + g * panel_bytes_ + t * kAmxRowBytes, kPairBytes);
          });
    }
    if (const int64_t rest = p_.in_features % kStep; rest > 0) {
      // What follows in memory belongs to another row or panel, or to no tensor; int8 rows are
      // padded with zeros.
      alignas(64) float row_copy[kAmxRows][kAmxRows];
      alignas(64) float pair_copy[kAmxRows][kAmxRows] = {};
      const auto load_rows = [&](int i) {
        if constexpr (kInt8) {
          tile_load<kRows>(x[i] + steps * kStep, x_bytes);
        } else {
          for (int m = 0; m < tile_rows_; ++m) {
            store(row_copy[m],
                  load_step(x[i] + m * p_.x_row_stride, steps * kStep, p_.in_features));
          }
          tile_load<kRows>(row_copy, kAmxRowBytes);
        }
      };
      const auto load_pairs = [&](int g, int64_t t) {
        const char* from = pairs + g * panel_bytes_ + t * kAmxRowBytes;
        for (int64_t k = 0; k * P::kTerms < rest; ++k, from += kPairBytes) {
          __builtin_memcpy(pair_copy[k], from, kAmxRowBytes);
        }
        tile_load<kPairs>(pair_copy, kAmxRowBytes);
      };
      multiply_step(steps, load_rows, load_pairs);
    }

    each_tile<kRowTiles * kColumns>([&]<int kSum>() {
      constexpr int kRow = kSum / kColumns, kColumn = kSum % kColumns;
      const int64_t output =
          (panel + kColumn / kTiles) * kPanelOutputs + (tile + kColumn % kTiles) * kAmxRows;
      if constexpr (kInt8) {
        const Vec scales = load_scales(p_, output);
        for (int m = 0; m < tile_rows_; ++m)
          results[kSum][m] = with_scales(results[kSum][m], scales);
      } else {
        tile_store<kSum>(results[kSum], kAmxRowBytes);
      }
      write_results(p_, row_ + rows[kRow], tile_rows_, output, results[kSum], 1);
    });
  }

  // Calls fn.operator()<i>() for i below kCount, in order.
  template <int kCount, typename Fn>
  static BATON_INLINE void each_tile(Fn&& fn) {
    if constexpr (kCount > 0) {
      each_tile<kCount - 1>(fn);
      fn.template operator()<kCount - 1>();
    }
  }

  const LinearPackedParams& p_;
  const int64_t row_, num_rows_;
  const int tile_rows_;
  const int64_t panel_bytes_;
};

}  // namespace baton::cpu::BATON_ISA

#endif  // BATON_HAS_TILES
