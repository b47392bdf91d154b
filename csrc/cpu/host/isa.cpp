// Chooses the kernels' instruction set at run time. Compiled for the baseline: this code runs
// before anything is known about the CPU.
#include "cpu/host/isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace baton::cpu {

namespace baseline {
extern const KernelTable kKernelTable;
}
#if defined(BATON_HAS_AVX2)
namespace avx2 {
extern const KernelTable kKernelTable;
}
#endif
#if defined(BATON_HAS_AVX512)
namespace avx512 {
extern const KernelTable kKernelTable;
}
#endif
#if defined(BATON_HAS_AVX512_BF16)
namespace avx512_bf16 {
extern const KernelTable kKernelTable;
}
#endif

#if defined(BATON_HAS_AMX_BF16)
namespace amx_bf16 {
extern const KernelTable kKernelTable;
}
#endif

namespace {

struct Entry {
  Isa isa;
  const KernelTable* table;  // null when not compiled
};

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// Tiles are 8 KiB of additional registers per thread, which Linux (from 5.16) grants on request.
// The permission belongs to the whole process: all threads, running or started later by anybody,
// and forked processes have it too. The request fails where a thread has installed a signal stack
// that is too small for the tiles.
bool has_amx_bf16() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned int kTileBf16Int8 = (1u << 24) | (1u << 22) | (1u << 25);
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) ||
      (edx & kTileBf16Int8) != kTileBf16Int8) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl; XSAVE's number
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const std::vector<Entry>& entries() {
  static const std::vector<Entry> list = [] {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    std::vector<Entry> result;
    const auto add = [&](const char* name, const KernelTable* table, bool found) {
      result.push_back({{name, table != nullptr, found}, table});
    };
    add("baseline", &baseline::kKernelTable, true);
#if defined(BATON_HAS_AVX2)
    add("avx2", &avx2::kKernelTable, has_avx2());
#else
    add("avx2", nullptr, has_avx2());
#endif
#if defined(BATON_HAS_AVX512)
    add("avx512", &avx512::kKernelTable, has_avx512());
#else
    add("avx512", nullptr, has_avx512());
#endif
#if defined(BATON_HAS_AVX512_BF16)
    add("avx512_bf16", &avx512_bf16::kKernelTable, has_avx512_bf16());
#else
    add("avx512_bf16", nullptr, has_avx512_bf16());
#endif
#if defined(BATON_HAS_AMX_BF16)
    add("amx_bf16", &amx_bf16::kKernelTable, has_amx_bf16());
#else
    add("amx_bf16", nullptr, has_amx_bf16());
#endif
    return result;
  }();
  return list;
}

const Entry* best() {
  const Entry* choice = nullptr;
  for (const Entry& entry : entries()) {
    if (entry.table != nullptr && entry.isa.found) choice = &entry;
  }
  return choice;
}

std::atomic<const Entry*>& current() {
  static std::atomic<const Entry*> entry{best()};
  return entry;
}

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> list = [] {
    std::vector<Isa> result;
    for (const Entry& entry : entries()) result.push_back(entry.isa);
    return result;
  }();
  return list;
}

const KernelTable& kernels() { return *current().load(std::memory_order_relaxed)->table; }

const char* isa_in_use() { return current().load(std::memory_order_relaxed)->isa.name; }

int64_t read_ahead_bytes() {
#if defined(__x86_64__)
  // AMD's Zen 4 loses up to a tenth of its rate to such prefetches. Intel's CPUs gain: their own
  // prefetches stop at the end of each 4 KiB page.
  static const int64_t bytes = __builtin_cpu_is("intel") ? 2048 : 0;
  return bytes;
#else
  return 0;
#endif
}

bool set_isa(const std::string& name, bool force) {
  if (name == "auto") {
    current() = best();
    return true;
  }
  for (const Entry& entry : entries()) {
    if (name == entry.isa.name && entry.table != nullptr && (entry.isa.found || force)) {
      current() = &entry;
      return true;
    }
  }
  return false;
}

}  // namespace baton::cpu
