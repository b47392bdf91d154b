// linear_packed for bfloat16 in AMX tiles: rows of x are the first operand, straight from memory,
// and a panel's pairs the second, as they lie. Six tiles of sums: 32 rows by one panel, or up to 16
// rows by two.
//
// Every element is summed over steps of 32 in ascending order, whatever shares its tile: a row's
// bits are its own.
#pragma once

#include "common/linear_packed.h"
#include "cpu/kernels.h"
#include "cpu/simd/amx_products.h"

#if defined(BATON_HAS_TILES)

namespace baton::cpu::BATON_ISA {

// A block of rows of x.
class PackedTiles {
 public:
  PackedTiles(const LinearPackedParams& p, int64_t row, int64_t row_end)
      : p_(p),
        row_(row),
        num_rows_(row_end - row),
        tile_rows_(num_rows_ < kAmxRows ? static_cast<int>(num_rows_) : kAmxRows),
        panel_bytes_(panel_bytes(p.dtype, p.in_features)) {
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(tile == kPairs ? kAmxRows : tile_rows_);
      config.row_bytes[tile] = kAmxRowBytes;
    }
    tile_configure(config);
  }
  // Left configured, tiles would be saved at every switch of threads.
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
  static constexpr int kPanelTiles = kPanelOutputs / kAmxRows;
  static_assert(kPanelTiles == kPackedParts && kPackedRowBlock % (2 * kAmxRows) == 0);
  static constexpr int kRows = 6, kPairs = 7;  // the tiles of both operands
  static constexpr int64_t kPairBytes = kPanelOutputs * 4;
  static constexpr int64_t kStepBytes = kAmxRows * kPairBytes;
  // Steps ahead of their use that weights are asked for.
  static constexpr int64_t kAheadSteps = 4;

  // All rows by kTiles tiles, from `tile` on, of each of kPanels panels.
  template <int kPanels, int kTiles>
  void columns(int64_t panel, int64_t tile) {
    for (int64_t row = 0; row < num_rows_;) {
      // The last tile holds 16 rows too where there are as many: the first of them once more.
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
    const BFloat16* x[kRowTiles];
    for (int i = 0; i < kRowTiles; ++i) {
      x[i] = static_cast<const BFloat16*>(p_.x) + (row_ + rows[i]) * p_.x_row_stride;
    }
    each_tile<kRowTiles * kColumns>([]<int kSum>() { tile_zero<kSum>(); });

    // One step: load_rows(i) and load_pairs(panel, tile) fill their tiles.
    const auto multiply_step = [&](auto&& load_rows, auto&& load_pairs) BATON_INLINE_LAMBDA {
      each_tile<kColumns>([&]<int kColumn>() {
        load_pairs(kColumn / kTiles, tile + kColumn % kTiles);
        // Back and forth, so that the rows at the turn are loaded once.
        each_tile<kRowTiles>([&]<int kTurn>() {
          constexpr int kRow = kColumn % 2 == 0 ? kTurn : kRowTiles - 1 - kTurn;
          if (kTurn > 0 || kColumn == 0) load_rows(kRow);
          tile_multiply<kRow * kColumns + kColumn, kRows, kPairs>();
        });
      });
    };
    const int64_t steps = p_.in_features / kAmxStep, x_bytes = 2 * p_.x_row_stride;
    for (int64_t step = 0; step < steps; ++step, pairs += kStepBytes) {
      if constexpr (kAhead) {
        const char* next = pairs + kAheadSteps * kStepBytes;
        for (int g = 0; g < kPanels; ++g, next += panel_bytes_) {
          for (int64_t i = 0; i < kStepBytes; i += 64) __builtin_prefetch(next + i, 0, 2);
        }
      }
      multiply_step([&](int i) { tile_load<kRows>(x[i] + step * kAmxStep, x_bytes); },
                    [&](int g, int64_t t) {
                      tile_load<kPairs>(pairs + g * panel_bytes_ + t * kAmxRowBytes, kPairBytes);
                    });
    }
    if (const int64_t rest = p_.in_features % kAmxStep; rest > 0) {
      // What follows in memory belongs to another row or panel, or to nobody.
      alignas(64) float row_copy[kAmxRows][kAmxRows];
      alignas(64) float pair_copy[kAmxRows][kAmxRows] = {};
      const auto load_rows = [&](int i) {
        for (int m = 0; m < tile_rows_; ++m) {
          store(row_copy[m],
                load_step(x[i] + m * p_.x_row_stride, steps * kAmxStep, p_.in_features));
        }
        tile_load<kRows>(row_copy, kAmxRowBytes);
      };
      const auto load_pairs = [&](int g, int64_t t) {
        const char* from = pairs + g * panel_bytes_ + t * kAmxRowBytes;
        for (int64_t k = 0; 2 * k < rest; ++k, from += kPairBytes) {
          __builtin_memcpy(pair_copy[k], from, kAmxRowBytes);
        }
        tile_load<kPairs>(pair_copy, kAmxRowBytes);
      };
      multiply_step(load_rows, load_pairs);
    }

    alignas(64) float sums[kAmxRows][kAmxRows];
    each_tile<kRowTiles * kColumns>([&]<int kSum>() {
      constexpr int kRow = kSum / kColumns, kColumn = kSum % kColumns;
      tile_store<kSum>(sums, kAmxRowBytes);
      const int64_t output =
          (panel + kColumn / kTiles) * kPanelOutputs + (tile + kColumn % kTiles) * kAmxRows;
      write_tile(sums, row_ + rows[kRow], output);
    });
  }

  // fn.operator()<i>() for i below kCount, in order.
  template <int kCount, typename Fn>
  static BATON_INLINE void each_tile(Fn&& fn) {
    if constexpr (kCount > 0) {
      each_tile<kCount - 1>(fn);
      fn.template operator()<kCount - 1>();
    }
  }

  void write_tile(const float (*sums)[kAmxRows], int64_t row, int64_t output) const {
    const int64_t rest = p_.out_features - output;
    if (rest <= 0) return;
    const int64_t count = rest < kAmxRows ? rest : kAmxRows;
    Vec bias = zero();
    if (p_.bias) bias = load_partial(static_cast<const BFloat16*>(p_.bias) + output, count);
    BFloat16* y = static_cast<BFloat16*>(p_.y) + row * p_.out_features + output;
    for (int m = 0; m < tile_rows_; ++m, y += p_.out_features) {
      const Vec result = p_.bias ? load(sums[m]) + bias : load(sums[m]);
      if (count < kAmxRows) {
        store_partial(y, result, count);
      } else {
        store(y, result);
      }
    }
  }

  const LinearPackedParams& p_;
  const int64_t row_, num_rows_;
  const int tile_rows_;
  const int64_t panel_bytes_;
};

}  // namespace baton::cpu::BATON_ISA

#endif  // BATON_HAS_TILES
