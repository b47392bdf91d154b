// The work of one call of ragged_attention on the CPU, planned from the rows' index values.
#pragma once

#include <cstdint>
#include <vector>

#include "common/ragged_attention.h"

namespace baton::bindings {

class AttentionPlan {
 public:
  void make(const RaggedAttentionParams& p);

  // Whether rows that read a segment together in this plan still have it in the same pages.
  bool fits_pages(const RaggedAttentionParams& p) const;

  std::vector<AttentionItem> items;
  std::vector<int64_t> partial_offsets;  // per row: where its partial results begin; -1 without any
  std::vector<int32_t> sharers;          // the rows of shared items
  int64_t partial_floats = 0;
  int64_t columns = 0;  // columns that the items read, summed

 private:
  // Rows that have a segment of their keys in the same place and read it together.
  struct Group {
    int64_t segment;
    int32_t first, count;  // in sharers
  };

  void share(const RaggedAttentionParams& p);
  void share_segment(const RaggedAttentionParams& p, std::vector<int32_t>& rows, int64_t segment);
  void add_group(const RaggedAttentionParams& p, const int32_t* rows, int32_t count,
                 int64_t segment);

  std::vector<Group> groups_;
  std::vector<int32_t> first_own_;  // per row: the first segment that it shares with no other row
};

}  // namespace baton::bindings
