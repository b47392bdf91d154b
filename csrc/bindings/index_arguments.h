// The index arguments of a call. Each may be left out; by default row i is in slot i, begins in
// column 0 and has one token.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "bindings/checks.h"
#include "common/indices.h"

namespace baton::bindings {

// Checks the arguments that are given and fills in the others, where the kernels can read them.
// That memory lives as long as this object, which must outlive the launch; torch's allocator hands
// it to no other stream before the kernels are done with it.
template <typename Device>
class IndexArguments {
 public:
  // `like` is on the device that the indices are on.
  IndexArguments(const Checker& check, const Tensor& like, int64_t num_rows)
      : check_(check), like_(like), num_rows_(num_rows) {}

  int64_t num_rows() const { return num_rows_; }

  const int32_t* slots(const char* name, const std::optional<Tensor>& given) {
    return given ? check_.index(name, *given, num_rows_) : ascending();
  }
  const int32_t* starts(const char* name, const std::optional<Tensor>& given) {
    return given ? check_.index(name, *given, num_rows_) : ascending() + num_rows_ + 1;
  }
  // The boundaries of the rows' tokens, `total` tokens in all.
  const int32_t* cu_seqlens(const char* name, const std::optional<Tensor>& given, int64_t total) {
    if (given) return check_.index(name, *given, num_rows_ + 1);
    if (total != num_rows_) {
      check_.fail(name, "given unless every row has one token",
                  format("None with ", total, " tokens in ", num_rows_, " rows"));
    }
    return ascending();
  }

 private:
  // 0, 1, ..., num_rows, and then num_rows zeros.
  const int32_t* ascending() {
    if (!memory_) {
      memory_.emplace(allocate(like_, {2 * num_rows_ + 1}, kCodes.int32));
      const Device device(check_, like_);
      device.fill_indices({static_cast<int32_t*>(memory_->mutable_data_ptr()), num_rows_});
    }
    return static_cast<const int32_t*>(memory_->const_data_ptr());
  }

  const Checker& check_;
  const Tensor& like_;
  int64_t num_rows_;
  std::optional<Tensor> memory_;
};

// A window in the form that kernels take: 0 means none. Lengths are below 2^31, so a wider window
// hides nothing; positions minus 2^63 would overflow.
inline int64_t clamped_window(const std::optional<int64_t>& window) {
  return std::min<int64_t>(window.value_or(0), INT32_MAX);
}

// The number of rows in a call: the length of the first of these that is given, else `otherwise`.
inline int64_t count_rows(std::initializer_list<const std::optional<Tensor>*> given,
                          int64_t otherwise) {
  for (const std::optional<Tensor>* tensor : given) {
    if (*tensor) return (*tensor)->numel();
  }
  return otherwise;
}

// The same for packed tokens; if no argument says otherwise, there is one token per row.
inline int64_t count_rows(const std::optional<Tensor>& slots, const std::optional<Tensor>& starts,
                          const std::optional<Tensor>& cu_seqlens, int64_t total_tokens) {
  return count_rows({&slots, &starts},
                    cu_seqlens ? std::max<int64_t>(cu_seqlens->numel() - 1, 0) : total_tokens);
}

}  // namespace baton::bindings
