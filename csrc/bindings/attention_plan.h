// The work of one call of ragged_attention on the CPU, planned from the rows' index values.
#pragma once

#include <cstdint>
#include <vector>

#include "common/ragged_attention.h"

namespace baton::bindings {

class AttentionPlan {
 public:
  void make(const RaggedAttentionParams& p);

  // Whether rows that the plan lets read together still have their columns in the same pages.
  bool fits_pages(const RaggedAttentionParams& p) const;

  std::vector<AttentionItem> items;
  std::vector<int64_t> partial_offsets;  // of the rows' partial results; -1 without any
  std::vector<int32_t> sharers;          // the rows of shared items
  int64_t partial_floats = 0;
  int64_t columns = 0;  // that the items read

 private:
  // Rows that have a segment of their keys in one place: they read it once.
  struct Group {
    int64_t segment;
    int32_t first, count;  // in sharers
  };

  void share(const RaggedAttentionParams& p);
  void share_segment(const RaggedAttentionParams& p, std::vector<int32_t>& rows, int64_t segment);
  void add_group(const RaggedAttentionParams& p, const int32_t* rows, int32_t count,
                 int64_t segment);

  std::vector<Group> groups_;
  std::vector<int32_t> first_own_;  // per row: its first segment that it reads alone
};

}  // namespace baton::bindings
