// Remembers the index values that an op last checked on this thread.
//
// Every layer of a model passes the same rows, in tensors that may be written in place, so only
// their contents tell whether they are the same. Comparing them with a copy costs a tenth of
// checking them, and the layers after the first need no more than that.
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

  // Whether these values were kept last, checked against the same limits.
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
    // Holds nothing until all values are copied: memory may run out in between.
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
