// Argument checks, the same for every device. Everything that memory safety needs stands here, so
// that a call through torch.ops is as safe as one through the Python functions; nothing is written
// before all checks have passed. The message is `<op>: <argument> must be <expected>, got
// <actual>`. Index values are checked on the CPU only: reading them on a GPU would make the host
// wait, so the CUDA kernels skip what is out of range (cuda/kernels.h).
//
// Every failure is std::invalid_argument, which Python sees as ValueError: the stable ABI has no
// way to name TypeError. The Python functions raise the documented classes
// (baton_kernels/ops/checks.py).
//
// Every layer of a valid call pays for these checks, so they allocate nothing and build text only
// when they fail.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/tensors.h"
#include "common/cache.h"
#include "common/dtype.h"
#include "common/kv_scales.h"

namespace baton::bindings {

template <typename... Args>
std::string format(const Args&... args) {
  std::ostringstream stream;
  ((stream << args), ...);
  return stream.str();
}

std::string shape_of(const Tensor& tensor);
const char* name_of(ScalarType type);

// [num_layers, num_slots, num_kv_heads, capacity, head_dim]
constexpr size_t kMaxCacheDims = 5;

// The bytes from a tensor's first to its last element.
struct Extent {
  const char *begin, *end;

  bool meets(const Extent& other) const { return begin < other.end && other.begin < end; }
};
Extent extent_of(const Tensor& tensor);
inline Extent extent_if(const Tensor* tensor) {
  return tensor ? extent_of(*tensor) : Extent{nullptr, nullptr};
}

// The tensors that a call writes and those that it reads; null stands for an argument that is left
// out.
using Extents = std::initializer_list<std::pair<const char*, Extent>>;
using NamedTensor = std::pair<const char*, const Tensor*>;
inline const Tensor* if_given(const std::optional<Tensor>& tensor) {
  return tensor ? &*tensor : nullptr;
}

class Checker {
 public:
  // Tensors must be on the CPU.
  explicit Checker(const char* op) : op_(op) {}
  // Tensors must be on the same device as `first`, a device of this type.
  Checker(const char* op, DeviceType type, const Tensor& first) : op_(op), type_(type) {
    if (type != DeviceType::CPU) index_ = first.get_device_index();
  }

  const char* op() const { return op_; }

  [[noreturn]] void fail(const std::string& argument, const std::string& expected,
                         const std::string& actual) const {
    throw std::invalid_argument(
        format(op_, ": ", argument, " must be ", expected, ", got ", actual));
  }

  // A float32, float16 or bfloat16 tensor.
  Dtype floating(const char* name, const Tensor& tensor) const;
  void dtype_as(const char* name, const Tensor& tensor, const char* other_name,
                const Tensor& other) const;
  void float32(const char* name, const Tensor& tensor) const;
  void int8(const char* name, const Tensor& tensor) const;
  void on_device(const char* name, const Tensor& tensor) const;
  void dims(const char* name, const Tensor& tensor, int64_t expected) const;
  void shape(const char* name, const Tensor& tensor, Sizes expected) const;
  void last_contiguous(const char* name, const Tensor& tensor) const;
  void contiguous(const char* name, const Tensor& tensor) const;
  // A tensor that is written must not have two elements in the same place. It has the dimensions of
  // a cache.
  void not_expanded(const char* name, const Tensor& tensor) const;

  // The byte ranges from first to last element of the two tensors do not overlap.
  void apart(const char* name, const Extent& extent, const char* other_name,
             const Tensor& other) const;

  // The same between everything that a call reads and everything that it writes; null arguments are
  // skipped. This includes index values: they are checked before the first byte is written and read
  // again afterwards.
  void written_apart(const Extents& written, std::initializer_list<NamedTensor> others) const;

  // Two tensors of one shape have no byte in common. They may be views of one tensor that
  // interleave, such as the keys and values of a page, provided that their strides are equal. Both
  // have the dimensions of a cache and are not expanded.
  void interleaved(const char* name, const Tensor& tensor, const char* other_name,
                   const Tensor& other) const;

  // A contiguous int32 vector of `size` elements (any size with -1).
  const int32_t* index(const char* name, const Tensor& tensor, int64_t size) const;

  // An int32 matrix with any number of columns, each row contiguous.
  const int32_t* index_rows(const char* name, const Tensor& tensor, int64_t rows) const;

  // key_cache and value_cache; with_layers allows a leading num_layers dimension. An eight-bit
  // cache must have scales, and no other may have them.
  CacheSizes caches(const Tensor& key_cache, const Tensor& value_cache, bool with_layers,
                    bool written, bool has_scales = false) const;

  // The dtype of a cache that has been checked.
  Dtype cache_dtype(const Tensor& cache) const;

  // The scales of eight-bit caches that have been checked.
  KvScales scales(const Tensor& key_scale, const Tensor& value_scale, const Tensor& key_cache,
                  const Tensor& value_cache, bool written) const;

  // Kernels count in int32.
  void fits_int32(const char* name, int64_t value) const {
    if (value > INT32_MAX) fail(name, "below 2^31", format(value));
  }

  void in_range(const char* name, int64_t i, int64_t value, int64_t low, int64_t high) const {
    if (value < low || value > high) {
      fail(format(name, "[", i, "]"), format("in [", low, ", ", high, "]"), format(value));
    }
  }

  // cu_seqlens: from 0, never decreasing, ending at total.
  void cumulative(const char* name, const int32_t* values, int64_t count, int64_t total,
                  const char* total_name) const;

 private:
  [[noreturn]] void overlap(const char* name, const char* other_name) const;

  const char* op_;
  DeviceType type_ = DeviceType::CPU;
  int32_t index_ = -1;
};

// Columns [begin, end) of a slot, and which entry of the call they belong to.
struct ColumnRange {
  int32_t slot;
  int32_t entry;
  int64_t begin, end;
};

// Index pair of two overlapping ranges of one slot, or {-1, -1}. Sorts the ranges.
std::pair<int32_t, int32_t> find_overlap(std::vector<ColumnRange>& ranges);

// The shape of packed tokens that fits a cache: [(num_layers,) total_tokens, num_kv_heads,
// head_dim].
class TokenShape {
 public:
  TokenShape(const CacheSizes& cache, int64_t total_tokens, size_t dims)
      : sizes_{cache.num_layers, total_tokens, cache.num_kv_heads, cache.head_dim}, dims_(dims) {}
  Sizes sizes() const { return {sizes_ + (4 - dims_), dims_}; }

 private:
  int64_t sizes_[4];
  size_t dims_;
};

// Strides of a cache [(num_layers,) num_slots, num_kv_heads, capacity, head_dim].
CacheStrides cache_strides(const Tensor& cache);
// Strides of tokens [(num_layers,) total_tokens, num_heads, head_dim].
TokenStrides token_strides(const Tensor& tokens);

}  // namespace baton::bindings
