// Calls of ragged_attention for a sanitizer or the judge to watch, on arrays of exactly the size
// they need. Results are the op tests' business.
#pragma once

#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/device/device.h"
#include "cuda/kernels.h"

namespace calls {

using namespace baton;

inline int failures = 0;

inline void expect(cudaError_t error, const char* op) {
  const auto reports = emulation::take_reports();
  for (const auto& report : reports) std::printf("%s: %s\n", op, report.c_str());
  if (error != cudaSuccess) std::printf("%s: CUDA error %d\n", op, error);
  failures += error != cudaSuccess || !reports.empty();
}

// Memory on the heap, so that AddressSanitizer knows where it ends, and known to the judge.
class Bytes {
 public:
  // Small numbers in every dtype.
  explicit Bytes(int64_t size) : Bytes(size, true) {
    for (int64_t i = 0; i < size; ++i) data_[i] = i % 2 ? 0x3c : i % 61;
  }
  explicit Bytes(const std::vector<int32_t>& indices) : Bytes(4 * indices.size(), false) {
    std::memcpy(data_, indices.data(), 4 * indices.size());
  }
  ~Bytes() {
    emulation::judge::clear_regions();
    ::operator delete[](data_, std::align_val_t{128});
  }
  Bytes(const Bytes&) = delete;
  template <typename T>
  operator T*() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  Bytes(int64_t size, bool writable) : data_(new (std::align_val_t{128}) uint8_t[size]) {
    emulation::judge::add_region(writable ? "an array" : "indices", data_, size, writable);
  }
  uint8_t* data_;
};

struct Shape {
  Dtype dtype;
  int64_t layers, heads, head_dim;
};

// A decode row that is split, a chunk, a prefill of two tiles, and a row with more query tokens
// than tokens; in pages of 24 columns or in slots, by the kernel that `prefill` names.
inline void attend(const Shape& s, bool options, bool paged = false,
                   PrefillKernel prefill = PrefillKernel::kAutomatic) {
  const bool warpgroups = prefill == PrefillKernel::kWgmma;
  constexpr int64_t kSlots = 3, kRows = 4, kTokens = 32, kColumns = 600, kPages = 25;
  const std::vector<int32_t> slot_of{1, 0, 2, 1};
  Bytes bounds({0, 1, 6, 26, kTokens}), slots(slot_of), starts({3, 30, 0, 8}),
      // More tiles of 128 keys than the warpgroup kernel has places for.
      lengths({590, warpgroups ? 570 : 70, warpgroups ? 600 : 40, 4});
  // Page j of a slot is in the slot's place, but for its number from the end.
  std::vector<int32_t> pages;
  for (const int32_t slot : slot_of) {
    for (int32_t j = 0; j < kPages; ++j) pages.push_back(slot * kPages + kPages - 1 - j);
  }
  Bytes table(pages);
  const int64_t heads = 4 * s.heads, token = heads * s.head_dim * size_of(s.dtype);
  const int64_t columns = paged ? kColumns / kPages : kColumns;
  const int64_t head = columns * s.head_dim, slot = s.heads * head;
  const int64_t num_slots = paged ? kSlots * kPages : kSlots;
  const int64_t cache = num_slots * slot * size_of(s.dtype);
  Bytes query(kTokens * token), out(kTokens * token), key_cache(cache), value_cache(cache),
      lse(kTokens * heads * 4), slopes(heads * 4), sinks(heads * 4);
  RaggedAttentionParams p{.query = query,
                          .key_cache = key_cache,
                          .value_cache = value_cache,
                          .out = out,
                          .lse = lse,
                          .cu_seqlens = bounds,
                          .slots = paged ? nullptr : static_cast<int32_t*>(slots),
                          .starts = starts,
                          .lengths = lengths,
                          .alibi_slopes = options ? static_cast<float*>(slopes) : nullptr,
                          .sinks = options ? static_cast<float*>(sinks) : nullptr,
                          .block_table = paged ? static_cast<int32_t*>(table) : nullptr,
                          .block_table_stride = kPages,
                          .max_pages = kPages,
                          .num_rows = kRows,
                          .num_heads = heads,
                          .sizes = {1, num_slots, s.heads, columns, s.head_dim},
                          .query_strides = {0, heads * s.head_dim, s.head_dim},
                          .key_cache_strides = {num_slots * slot, slot, head, s.head_dim},
                          .value_cache_strides = {num_slots * slot, slot, head, s.head_dim},
                          .scale = 0.1f,
                          .softcap = options ? 5.0f : 0.0f,
                          .window = options ? 50 : 0,
                          .causal = true,
                          .dtype = s.dtype,
                          .cache_dtype = s.dtype,
                          .scales = {},
                          .total_queries = kTokens,
                          .max_query_length = 20,
                          .max_length = kColumns,
                          .prefill = prefill,
                          .workspace = nullptr};
  Bytes workspace(cuda::ragged_attention_workspace(p) * 4);
  p.workspace = workspace;
  expect(cuda::ragged_attention(p, nullptr), "ragged_attention");
}

}  // namespace calls
