// ragged_attention: index values, the plan of work, and the CPU call.
#include "bindings/ragged_attention.h"

#include "bindings/attention_plan.h"
#include "bindings/box.h"
#include "bindings/index_memo.h"
#include "bindings/parallel.h"
#include "cpu/host/isa.h"

namespace baton::bindings {

namespace {

void check_rows(const Checker& check, const RaggedAttentionParams& p) {
  check.cumulative("cu_seqlens_q", p.cu_seqlens, p.num_rows + 1, p.total_queries, "total_queries");
  const int64_t columns = attention_columns(p);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    const int64_t query_length = p.cu_seqlens[i + 1] - p.cu_seqlens[i];
    if (p.slots) check.in_range("slots", i, p.slots[i], 0, p.sizes.num_slots - 1);
    check.in_range("lengths", i, p.lengths[i], 0, columns);
    check.in_range("starts", i, p.starts[i], 0, columns - p.lengths[i]);
    if (query_length > p.max_query_length) {
      check.fail("max_query_length", format("at least the longest query, ", query_length),
                 format(p.max_query_length));
    }
    if (p.lengths[i] > p.max_length) {
      check.fail("max_length", format("at least the longest row, ", p.lengths[i]),
                 format(p.max_length));
    }
  }
}

// Checks the pages that hold columns of the rows (already checked); other entries may be anything.
void check_page_values(const Checker& check, const RaggedAttentionParams& p) {
  const uint32_t num_pages = static_cast<uint32_t>(p.sizes.num_slots);
  for (int64_t i = 0; i < p.num_rows; ++i) {
    if (p.lengths[i] == 0) continue;
    const int32_t* pages = p.block_table + i * p.block_table_stride;
    const int64_t begin = p.starts[i] / p.sizes.capacity;
    const int64_t end = (p.starts[i] + int64_t{p.lengths[i]} - 1) / p.sizes.capacity + 1;
    // One comparison for both ends, and no branch: a row may have a page for every column.
    bool is_bad = false;
    for (int64_t j = begin; j < end; ++j) is_bad |= static_cast<uint32_t>(pages[j]) >= num_pages;
    if (!is_bad) continue;
    for (int64_t j = begin; j < end; ++j) {
      check.in_range(format("block_table[", i, "]").c_str(), j, pages[j], 0, p.sizes.num_slots - 1);
    }
  }
}

// The rows that this thread checked and planned last, which all layers of a step share.
struct PlannedRows {
  IndexMemo checked;
  AttentionPlan plan;

  void update(const Checker& check, const RaggedAttentionParams& p) {
    const std::initializer_list<int64_t> limits{
        p.total_queries,  p.max_query_length,   p.max_length,
        p.num_heads,      p.sizes.num_kv_heads, p.sizes.num_slots,
        p.sizes.capacity, p.sizes.head_dim,     p.block_table ? p.max_pages : -1};
    const std::initializer_list<IndexMemo::Values> values{{p.cu_seqlens, p.num_rows + 1},
                                                          {p.slots, p.slots ? p.num_rows : 0},
                                                          {p.starts, p.num_rows},
                                                          {p.lengths, p.num_rows}};
    if (checked.holds(limits, values)) {
      if (!p.block_table) return;
      check_page_values(check, p);
      if (plan.fits_pages(p)) return;
    }
    checked.forget();
    check_rows(check, p);
    if (p.block_table) check_page_values(check, p);
    plan.make(p);
    checked.keep(limits, values);
  }

  // Bounds the memory that stays with the thread: 1 MiB of items.
  void trim() {
    if (plan.items.capacity() * sizeof(AttentionItem) > 1024 * 1024) *this = {};
  }

  static PlannedRows& of_this_thread() {
    thread_local PlannedRows rows;
    return rows;
  }
};

struct Cpu : CpuDevice {
  using CpuDevice::CpuDevice;

  static void check_values(const Checker& check, const RaggedAttentionParams& p) {
    PlannedRows::of_this_thread().update(check, p);
  }

  void run(const RaggedAttentionParams& p, const Tensor& query) const {
    PlannedRows& rows = PlannedRows::of_this_thread();
    const AttentionPlan& plan = rows.plan;
    std::optional<Tensor> partials;
    AttentionWork work{plan.items.data(), static_cast<int64_t>(plan.items.size()),
                       plan.partial_offsets.data(), nullptr, plan.sharers.data()};
    if (plan.partial_floats > 0) {
      partials.emplace(allocate(query, {plan.partial_floats}, kCodes.float32));
      work.partials = static_cast<float*>(partials->mutable_data_ptr());
    }
    const int64_t bytes = plan.columns * bytes_per_token(p.sizes, p.cache_dtype);
    const cpu::KernelTable& kernels = cpu::kernels();
    for_each_item(
        work.num_items, bytes,
        [&](int64_t begin, int64_t end) { kernels.ragged_attention(p, work, begin, end); },
        kNeighbors);
    if (plan.partial_floats > 0) {
      for_each_item(
          p.num_rows * p.sizes.num_kv_heads, plan.partial_floats * 4,
          [&](int64_t begin, int64_t end) { kernels.ragged_attention_merge(p, work, begin, end); },
          kNeighbors);
    }
    rows.trim();
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CPU, library) {
  library.impl("ragged_attention", box<&RaggedAttention<Cpu>::plain>);
  library.impl("ragged_attention.options", box<&RaggedAttention<Cpu>::options<false>>);
  library.impl("ragged_attention.lse", box<&RaggedAttention<Cpu>::options<true>>);
  library.impl("ragged_attention.out", box<&RaggedAttention<Cpu>::out>);
  library.impl("ragged_attention.lse_out", box<&RaggedAttention<Cpu>::lse_out>);
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, Negative, library) {
  library.impl("ragged_attention.out", box_lazy<&RaggedAttention<Cpu>::out>);
  library.impl("ragged_attention.lse_out", box_lazy<&RaggedAttention<Cpu>::lse_out>);
}

}  // namespace baton::bindings
