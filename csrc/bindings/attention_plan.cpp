// Plans the work items of all rows, and finds segments whose keys several rows share.
//
// Rows share a segment if all of its keys lie in the same place for each of them: in the same slot
// from the same column on, or in the same pages. What a row computes from a segment depends only on
// its own query vectors, so reading the segment once for all of them changes no bit.
#include "bindings/attention_plan.h"

#include <algorithm>
#include <cstring>

namespace baton::bindings {

namespace {

// The number of segments that lie within the row completely.
int64_t whole_segments(const RaggedAttentionParams& p, int32_t row) {
  const int64_t length = p.lengths[row];
  return length == 0 ? 0 : attention_segment_of(length);
}

// Negative, 0 or positive: orders rows so that rows whose keys of this segment lie in the same
// place are neighbors. Both rows have the whole segment.
int compare_places(const RaggedAttentionParams& p, int32_t a, int32_t b, int64_t segment) {
  const auto order = [](int64_t x, int64_t y) { return x < y ? -1 : x > y; };
  if (!p.block_table) {
    const int by_slot = order(p.slots[a], p.slots[b]);
    return by_slot != 0 ? by_slot : order(p.starts[a], p.starts[b]);
  }
  const int64_t page = p.sizes.capacity;
  const int by_column = order(p.starts[a] % page, p.starts[b] % page);
  if (by_column != 0) return by_column;
  const auto pages = [&](int32_t row) {
    return p.block_table + row * p.block_table_stride +
           (p.starts[row] + attention_segment_begin(segment)) / page;
  };
  const int64_t end = p.starts[a] + attention_segment_begin(segment + 1) - 1;
  const int64_t count = end / page - (p.starts[a] + attention_segment_begin(segment)) / page + 1;
  return std::memcmp(pages(a), pages(b), count * sizeof(int32_t));
}

}  // namespace

void AttentionPlan::make(const RaggedAttentionParams& p) {
  items.clear();
  sharers.clear();
  groups_.clear();
  partial_offsets.assign(p.num_rows, -1);
  first_own_.assign(p.num_rows, 0);
  partial_floats = columns = 0;
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  share(p);
  for (int32_t row = 0; row < p.num_rows; ++row) {
    const int64_t query_length = p.cu_seqlens[row + 1] - p.cu_seqlens[row];
    const AttentionRowPlan own = plan_attention_row(query_length, p.lengths[row], group);
    columns += own.num_tiles * (p.lengths[row] - attention_segment_begin(first_own_[row]));
    if (own.num_splits > 1) {
      partial_offsets[row] = partial_floats;
      partial_floats +=
          query_length * p.num_heads * own.num_splits * attention_partial_size(p.sizes.head_dim);
    }
    for (int32_t head = 0; head < p.sizes.num_kv_heads; ++head) {
      // The last tile of a causal row takes longest, so it comes first: no thread ends with it.
      for (int32_t tile = static_cast<int32_t>(own.num_tiles) - 1; tile >= 0; --tile) {
        for (int32_t split = first_own_[row]; split < own.num_splits; ++split) {
          items.push_back({row, head, tile, split});
        }
      }
    }
  }
}

bool AttentionPlan::fits_pages(const RaggedAttentionParams& p) const {
  return std::all_of(groups_.begin(), groups_.end(), [&](const Group& group) {
    const int32_t* rows = &sharers[group.first];
    return std::all_of(rows + 1, rows + group.count, [&](int32_t row) {
      return compare_places(p, rows[0], row, group.segment) == 0;
    });
  });
}

void AttentionPlan::share(const RaggedAttentionParams& p) {
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  std::vector<int32_t> rows;
  for (int32_t row = 0; row < p.num_rows; ++row) {
    const int64_t query_length = p.cu_seqlens[row + 1] - p.cu_seqlens[row];
    const AttentionRowPlan own = plan_attention_row(query_length, p.lengths[row], group);
    // Rows with several tiles merge their segments as they go, so they do not take part.
    if (own.num_splits > 1 && query_length * group <= kAttentionTileQueries) rows.push_back(row);
  }
  share_segment(p, rows, 0);
}

// `rows` share all segments before this one.
void AttentionPlan::share_segment(const RaggedAttentionParams& p, std::vector<int32_t>& rows,
                                  int64_t segment) {
  std::erase_if(rows, [&](int32_t row) { return whole_segments(p, row) <= segment; });
  if (rows.size() < 2) return;
  std::stable_sort(rows.begin(), rows.end(),
                   [&](int32_t a, int32_t b) { return compare_places(p, a, b, segment) < 0; });
  for (size_t begin = 0, end = 0; begin < rows.size(); begin = end) {
    for (end = begin + 1; end < rows.size(); ++end) {
      if (compare_places(p, rows[begin], rows[end], segment) != 0) break;
    }
    if (end - begin < 2) continue;
    add_group(p, &rows[begin], static_cast<int32_t>(end - begin), segment);
    std::vector<int32_t> group(rows.begin() + begin, rows.begin() + end);
    share_segment(p, group, segment + 1);
  }
}

void AttentionPlan::add_group(const RaggedAttentionParams& p, const int32_t* rows, int32_t count,
                              int64_t segment) {
  const int32_t first = static_cast<int32_t>(sharers.size());
  groups_.push_back({segment, first, count});
  sharers.insert(sharers.end(), rows, rows + count);
  const int64_t keys = attention_segment_begin(segment + 1) - attention_segment_begin(segment);
  columns += keys;
  const int64_t group = p.num_heads / p.sizes.num_kv_heads;
  const auto vectors = [&](int32_t row) {
    return group * (p.cu_seqlens[row + 1] - p.cu_seqlens[row]);
  };
  for (int32_t i = 0; i < count; ++i) first_own_[rows[i]] = static_cast<int32_t>(segment) + 1;
  for (int32_t head = 0; head < p.sizes.num_kv_heads; ++head) {
    for (int32_t begin = 0, end = 0; begin < count; begin = end) {
      int64_t taken = vectors(rows[begin]);
      for (end = begin + 1; end < count; ++end) {
        if (taken + vectors(rows[end]) > kAttentionTileQueries) break;
        taken += vectors(rows[end]);
      }
      items.push_back(
          {rows[begin], head, 0, static_cast<int32_t>(segment), first + begin, end - begin});
    }
  }
}

}  // namespace baton::bindings
