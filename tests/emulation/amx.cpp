// The emulated AMX instructions, and what the tests call by name (extern "C").
#include "emulation/amx.h"

#include <immintrin.h>

#include <atomic>
#include <cstring>

#include "cpu/kernels.h"

namespace baton::cpu::amx_emulated {
extern const KernelTable kKernelTable;
}

namespace emulation {

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// What one thread's tile registers hold.
struct State {
  Config config;
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};
thread_local State state;

struct Counts {
  std::atomic<int64_t> configures, releases, zeros, loads, stores, multiplies;
};
Counts counts;
std::atomic<const char*> first_fault{nullptr};

void fault(const char* what) {
  const char* none = nullptr;
  first_fault.compare_exchange_strong(none, what);
}

// The tile as an operand; faults where it may not be one.
bool is_configured(int tile) {
  const bool known = tile >= 0 && tile < kTiles;
  if (known && state.config.palette == 1 && state.config.rows[tile] > 0) return true;
  fault("#UD: a tile that is not configured");
  return false;
}

// Every write of a tile clears what lies beyond its configured rows and bytes.
void clear(int tile) { std::memset(state.data[tile], 0, sizeof(state.data[tile])); }

bool is_valid(const Config& config) {
  if (config.palette > 1) return false;
  for (uint8_t byte : config.reserved) {
    if (byte != 0) return false;
  }
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.row_bytes[tile];
    if (tile >= kTiles && (rows != 0 || bytes != 0)) return false;
    if (rows > kRows || bytes > kRowBytes || (rows == 0) != (bytes == 0)) return false;
  }
  return true;
}

struct Product {
  int rows, pairs, columns;
  const uint8_t (*a)[kRowBytes];
  const uint8_t (*b)[kRowBytes];
  uint8_t (*sum)[kRowBytes];
};

// The element of a pair as a float: even ones lie in the lower half.
__m512 even(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
__m512 odd(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)));
}

// Not inlined: its arithmetic stays between the two changes of the rounding mode.
__attribute__((noinline)) void multiply(const Product& p) {
  const __mmask16 columns = static_cast<__mmask16>((1u << p.columns) - 1);
  for (int m = 0; m < p.rows; ++m) {
    __m512 evens = _mm512_setzero_ps(), odds = _mm512_setzero_ps();
    for (int k = 0; k < p.pairs; ++k) {
      int32_t pair;
      std::memcpy(&pair, p.a[m] + 4 * k, 4);
      const __m512i a = _mm512_set1_epi32(pair), b = _mm512_load_si512(p.b[k]);
      evens = _mm512_fmadd_ps(even(a), even(b), evens);
      odds = _mm512_fmadd_ps(odd(a), odd(b), odds);
    }
    const __m512 before = _mm512_load_ps(p.sum[m]);
    const __m512 after = _mm512_add_ps(before, _mm512_add_ps(evens, odds));
    _mm512_store_ps(p.sum[m], _mm512_maskz_mov_ps(columns, after));
  }
}

}  // namespace

void tile_configure(const void* memory) {
  ++counts.configures;
  Config config;
  std::memcpy(&config, memory, sizeof(config));
  if (!is_valid(config)) return fault("#GP: an invalid tile configuration");
  std::memset(&state, 0, sizeof(state));
  if (config.palette == 1) state.config = config;
}

void tile_release() {
  ++counts.releases;
  std::memset(&state, 0, sizeof(state));
}

void tile_zero(int tile) {
  ++counts.zeros;
  if (is_configured(tile)) clear(tile);
}

void tile_load(int tile, const void* rows, int64_t stride) {
  ++counts.loads;
  if (!is_configured(tile)) return;
  clear(tile);
  for (int i = 0; i < state.config.rows[tile]; ++i) {
    std::memcpy(state.data[tile][i], static_cast<const uint8_t*>(rows) + i * stride,
                state.config.row_bytes[tile]);
  }
}

void tile_store(int tile, void* rows, int64_t stride) {
  ++counts.stores;
  if (!is_configured(tile)) return;
  for (int i = 0; i < state.config.rows[tile]; ++i) {
    std::memcpy(static_cast<uint8_t*>(rows) + i * stride, state.data[tile][i],
                state.config.row_bytes[tile]);
  }
}

void tile_multiply(int sum, int a, int b) {
  ++counts.multiplies;
  if (!is_configured(sum) || !is_configured(a) || !is_configured(b)) return;
  const uint8_t* rows = state.config.rows;
  const uint16_t* bytes = state.config.row_bytes;
  if (sum == a || sum == b || a == b) return fault("#UD: one tile as two operands");
  if (bytes[sum] % 4 != 0 || bytes[a] % 4 != 0 || bytes[b] % 4 != 0) {
    return fault("#UD: rows that are not whole pairs");
  }
  if (rows[sum] != rows[a] || bytes[sum] != bytes[b] || bytes[a] / 4 != rows[b]) {
    return fault("#UD: shapes that do not multiply");
  }
  // All exceptions masked, round to nearest even, flush to zero, denormals are zeros.
  const unsigned int before = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  multiply(
      {rows[sum], bytes[a] / 4, bytes[sum] / 4, state.data[a], state.data[b], state.data[sum]});
  _mm_setcsr(before);
}

}  // namespace emulation

#define BATON_EXPORT extern "C" __attribute__((visibility("default")))

BATON_EXPORT const baton::cpu::KernelTable* kernel_table() {
  return &baton::cpu::amx_emulated::kKernelTable;
}

// The first fault since the last call, or null. Tiles that this thread left configured are one.
BATON_EXPORT const char* take_fault() {
  if (emulation::state.config.palette != 0) emulation::fault("tiles were not released");
  std::memset(&emulation::state, 0, sizeof(emulation::state));
  return emulation::first_fault.exchange(nullptr);
}

// Instructions since the last call: configures, releases, zeros, loads, stores, multiplies.
BATON_EXPORT void take_counts(int64_t* out) {
  emulation::Counts& counts = emulation::counts;
  for (auto* count : {&counts.configures, &counts.releases, &counts.zeros, &counts.loads,
                      &counts.stores, &counts.multiplies}) {
    *out++ = count->exchange(0);
  }
}

// Single instructions, for the tests of this file.
BATON_EXPORT void tile_configure(const void* config) { emulation::tile_configure(config); }
BATON_EXPORT void tile_release() { emulation::tile_release(); }
BATON_EXPORT void tile_zero(int tile) { emulation::tile_zero(tile); }
BATON_EXPORT void tile_load(int tile, const void* rows, int64_t stride) {
  emulation::tile_load(tile, rows, stride);
}
BATON_EXPORT void tile_store(int tile, void* rows, int64_t stride) {
  emulation::tile_store(tile, rows, stride);
}
BATON_EXPORT void tile_multiply(int sum, int a, int b) { emulation::tile_multiply(sum, a, b); }
