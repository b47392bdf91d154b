// The index values that an op has checked last, on this thread.
//
// Every layer of a model calls with the same rows, in tensors whose values only their contents tell
// (they may be written in place). Comparing them with a copy costs a tenth of checking them, so the
// layers after the first do just that.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <vector>

namespace baton::bindings {

class IndexMemo {
 public:
  struct Values {
    const int32_t* data;
    int64_t count;
  };

  // Whether these are the values that were kept last, and held against the same limits.
  bool holds(std::initializer_list<int64_t> limits, std::initializer_list<Values> values) const {
    if (!std::equal(limits.begin(), limits.end(), limits_.begin(), limits_.end())) return false;
    size_t begin = 0;
    for (const auto& [data, count] : values) {
      if (values_.size() - begin < static_cast<size_t>(count)) return false;
      if (count > 0 && std::memcmp(&values_[begin], data, count * sizeof(int32_t)) != 0) {
        return false;
      }
      begin += count;
    }
    return begin == values_.size();
  }

  void keep(std::initializer_list<int64_t> limits, std::initializer_list<Values> values) {
    // Holds nothing until all values are there: memory may run out in between.
    limits_.clear();
    values_.clear();
    for (const auto& [data, count] : values) {
      if (values_.size() + count > kMaxValues) return forget();
      values_.insert(values_.end(), data, data + count);
    }
    limits_ = limits;
  }

  void forget() { *this = {}; }

 private:
  // Bounds the memory that stays with a thread: 1 MiB.
  static constexpr size_t kMaxValues = 256 * 1024;

  std::vector<int64_t> limits_;  // empty: holds nothing
  std::vector<int32_t> values_;
};

}  // namespace baton::bindings
