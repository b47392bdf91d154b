// AMX tile instructions in software: palette 1, TDPBF16PS and TDPBSSD as Intel's manual defines
// them.
//
// On a CPU without AMX each of them raises SIGILL; the handler here reads the instruction from the
// program, does it, and goes on behind it. So the built library itself runs, not another version of
// it. What would be an exception of a CPU with AMX (#GP, #UD) is kept as a fault, which the tests
// request. Every thread has its own tiles; instructions are counted over all threads.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

// The contents of one thread's tile registers.
struct State {
  Config config;
  alignas(64) uint8_t data[kTiles][kRows][kRowBytes];
};
thread_local State state;

struct Counts {
  std::atomic<int64_t> configures, releases, zeros, loads, stores, multiplies;
  std::atomic<int64_t> products;  // of elements, in all of these multiplies
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

// Fours of signed bytes instead of pairs; sums are int32 and wrap.
void multiply_bytes(const Product& p) {
  for (int m = 0; m < p.rows; ++m) {
    for (int n = 0; n < p.columns; ++n) {
      uint32_t sum;
      std::memcpy(&sum, p.sum[m] + 4 * n, 4);
      for (int k = 0; k < p.pairs; ++k) {
        for (int i = 0; i < 4; ++i) {
          const int a = static_cast<int8_t>(p.a[m][4 * k + i]);
          const int b = static_cast<int8_t>(p.b[k][4 * n + i]);
          sum += static_cast<uint32_t>(a * b);
        }
      }
      std::memcpy(p.sum[m] + 4 * n, &sum, 4);
    }
  }
}

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

// sum += a b: for each element two chains of fused multiply-adds from 0, one over the even and one
// over the odd elements of the pairs; their sum is added to the element. Round to nearest even;
// denormal inputs count as 0 and denormal results become 0. Of bytes the sums are whole numbers.
void tile_multiply(int sum, int a, int b, bool of_bytes = false) {
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
  counts.products += int64_t{rows[sum]} * (bytes[sum] / 4) * (of_bytes ? bytes[a] : bytes[a] / 2);
  const Product product{rows[sum],     bytes[a] / 4,  bytes[sum] / 4,
                        state.data[a], state.data[b], state.data[sum]};
  if (of_bytes) return multiply_bytes(product);
  // All exceptions masked, round to nearest even, flush to zero, denormals are zeros.
  const unsigned int before = _mm_getcsr();
  _mm_setcsr(0x9fc0);
  multiply(product);
  _mm_setcsr(before);
}

// A register of the interrupted program by its number in an instruction.
int64_t general_register(const ucontext_t& context, int number) {
  static constexpr int kPlaces[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                      REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                      REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

// A VEX instruction of three prefix bytes in the opcode map 0F38, W0, L0.
struct Instruction {
  int prefix;  // 0: none, 1: 66, 2: F3, 3: F2
  int opcode, mod, reg, rm, vvvv;
  bool has_sib = false;
  int64_t base = 0, index = 0;  // of the address: base and displacement, and the scaled index
  int length = 5;
};

bool decode(const ucontext_t& context, const uint8_t* code, Instruction& i) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const int extend_index = ~code[1] >> 6 & 1, extend_base = ~code[1] >> 5 & 1;
  i.prefix = code[2] & 3;
  i.vvvv = ~code[2] >> 3 & 15;
  i.opcode = code[3];
  i.mod = code[4] >> 6;
  i.reg = code[4] >> 3 & 7;
  i.rm = code[4] & 7;
  if (i.mod == 3) return true;
  int base = i.rm;
  i.has_sib = i.rm == 4;
  if (i.has_sib) {
    const uint8_t sib = code[i.length++];
    const int index = (sib >> 3 & 7) + 8 * extend_index;
    base = sib & 7;
    if (index != 4) i.index = general_register(context, index) << (sib >> 6);
  }
  if (base == 5 && i.mod == 0) return false;  // an absolute or relative address
  i.base = general_register(context, base + 8 * extend_base);
  if (i.mod == 1) {
    i.base += static_cast<int8_t>(code[i.length++]);
  } else if (i.mod == 2) {
    int32_t displacement;
    std::memcpy(&displacement, code + i.length, 4);
    i.base += displacement;
    i.length += 4;
  }
  return true;
}

// Whether it is an instruction of csrc/cpu/simd/amx.h; then it is done.
bool execute(const Instruction& i) {
  const bool in_memory = i.mod != 3;
  void* address = reinterpret_cast<void*>(i.base + (i.opcode == 0x49 ? i.index : 0));
  if (i.opcode == 0x49 && i.prefix == 0 && in_memory && i.reg == 0) {
    tile_configure(address);
  } else if (i.opcode == 0x49 && i.prefix == 0 && !in_memory && i.reg == 0 && i.rm == 0) {
    tile_release();
  } else if (i.opcode == 0x49 && i.prefix == 3 && !in_memory && i.rm == 0) {
    tile_zero(i.reg);
  } else if (i.opcode == 0x4b && i.prefix == 3 && i.has_sib) {
    tile_load(i.reg, address, i.index);
  } else if (i.opcode == 0x4b && i.prefix == 2 && i.has_sib) {
    tile_store(i.reg, address, i.index);
  } else if (i.opcode == 0x5c && i.prefix == 2 && !in_memory) {
    tile_multiply(i.reg, i.rm, i.vvvv);
  } else if (i.opcode == 0x5e && i.prefix == 3 && !in_memory) {
    tile_multiply(i.reg, i.rm, i.vvvv, true);
  } else {
    return false;
  }
  return true;
}

struct sigaction before;

void on_illegal_instruction(int, siginfo_t*, void* context_pointer) {
  ucontext_t& context = *static_cast<ucontext_t*>(context_pointer);
  greg_t& place = context.uc_mcontext.gregs[REG_RIP];
  Instruction instruction;
  if (decode(context, reinterpret_cast<const uint8_t*>(place), instruction) &&
      execute(instruction)) {
    place += instruction.length;
  } else {
    sigaction(SIGILL, &before, nullptr);  // comes again, to whom it may concern
  }
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// From here to emulate_end() the process can execute AMX.
EXPORT void emulate_begin() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
}
EXPORT void emulate_end() { sigaction(SIGILL, &before, nullptr); }

// The first fault since the last call, or null. Tiles that this thread left configured are one.
EXPORT const char* take_fault() {
  if (state.config.palette != 0) fault("tiles were not released");
  std::memset(&state, 0, sizeof(state));
  return first_fault.exchange(nullptr);
}

// Instructions since the last call: configures, releases, zeros, loads, stores, multiplies; and the
// products of elements.
EXPORT void take_counts(int64_t* out) {
  for (auto* count : {&counts.configures, &counts.releases, &counts.zeros, &counts.loads,
                      &counts.stores, &counts.multiplies, &counts.products}) {
    *out++ = count->exchange(0);
  }
}

// Single instructions, for the tests of this file.
EXPORT void model_configure(const void* config) { tile_configure(config); }
EXPORT void model_release() { tile_release(); }
EXPORT void model_zero(int tile) { tile_zero(tile); }
EXPORT void model_load(int tile, const void* rows, int64_t stride) {
  tile_load(tile, rows, stride);
}
EXPORT void model_store(int tile, void* rows, int64_t stride) { tile_store(tile, rows, stride); }
EXPORT void model_multiply(int sum, int a, int b) { tile_multiply(sum, a, b); }
EXPORT void model_multiply_bytes(int sum, int a, int b) { tile_multiply(sum, a, b, true); }
