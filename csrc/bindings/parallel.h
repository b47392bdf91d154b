// The CPU as a device of the bindings: a kernel's work items run on the number of threads that
// torch's operators use, but not on torch's threads (cpu/host/team.h), unless `use_torch_threads`
// says so.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "bindings/checks.h"
#include "common/cache.h"
#include "common/dtype.h"
#include "common/indices.h"
#include "cpu/host/float_mode.h"
#include "cpu/host/team.h"

namespace baton::bindings {

// Work below this number of bytes takes less time than handing some of it to a thread that is
// awake, and work below the second number less than waking one.
constexpr int64_t kSerialBytes = 32 * 1024;
constexpr int64_t kAwakeBytes = 512 * 1024;
// The same for torch's threads, which may be awake or not: the size from which torch's elementwise
// operators divide work.
constexpr int64_t kTorchBytes = 128 * 1024;

// Whether torch's threads take part, in the place of the ops' own: `use_torch_threads`.
inline std::atomic<bool> takes_torch_threads{false};

struct CpuDevice {
  static constexpr DeviceType kType = DeviceType::CPU;
  CpuDevice(const Checker&, const Tensor&) {}

  void fill_indices(const IndicesParams& p) const {
    for (int64_t i = 0; i <= p.num_rows; ++i) p.values[i] = static_cast<int32_t>(i);
    std::fill_n(p.values + p.num_rows + 1, p.num_rows, 0);
  }
};

// Bytes of the keys and values of one token in all layers.
inline int64_t bytes_per_token(const CacheSizes& sizes, Dtype dtype) {
  return sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * size_of(dtype) * 2;
}

// How many items a thread takes at once at most, where neighboring items prefetch each other's
// data.
constexpr int64_t kNeighbors = 16;

// Calls run(begin, end) over [0, num_items). Threads take items from a common counter: items may
// differ in cost, and each writes only its own results, so any order will do. A thread takes at
// most `chunk` items at a time, fewer towards the end, so that no thread is left with many while
// the others have none.
template <typename Fn>
void for_each_item(int64_t num_items, int64_t total_bytes, const Fn& run, int64_t chunk = 1) {
  if (num_items == 0) return;
  const bool on_torch = takes_torch_threads.load(std::memory_order_relaxed);
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), num_items);
  if (threads == 1 || total_bytes < (on_torch ? kTorchBytes : kSerialBytes)) {
    run(0, num_items);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto take_items = [&] {
    int64_t begin = next.load(std::memory_order_relaxed);
    while (begin < num_items) {
      const int64_t count = std::clamp<int64_t>((num_items - begin) / (2 * threads), 1, chunk);
      if (!next.compare_exchange_weak(begin, begin + count, std::memory_order_relaxed)) continue;
      run(begin, begin + count);
      begin = next.load(std::memory_order_relaxed);
    }
  };
  if (on_torch) {
    // One call for each thread, which ends when no item is left.
    const auto take_on_torch = [&, mode = cpu::float_mode()](int64_t, int64_t) {
      const cpu::FloatModeScope scope(mode);
      take_items();
    };
    torch::stable::parallel_for(0, threads, 1, take_on_torch);
    return;
  }
  const auto call = [](const void* take) { (*static_cast<const decltype(take_items)*>(take))(); };
  cpu::run_on_team(static_cast<int>(threads - 1), total_bytes >= kAwakeBytes, call, &take_items);
}

}  // namespace baton::bindings
