// Argument checks that several ops share.
#include "bindings/checks.h"

#include <algorithm>
#include <cstdlib>

namespace baton::bindings {

namespace {

std::string shape_text(Sizes sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

}  // namespace

std::string shape_of(const Tensor& tensor) { return shape_text(tensor.sizes()); }

const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Bool:
      return "bool";
    default:
      return "another dtype";
  }
}

void Checker::on_device(const char* name, const Tensor& tensor) const {
  if (type_ == DeviceType::CPU) {
    if (tensor.device_code() != kCodes.cpu)
      fail(name, "on the cpu, where the other tensors are", "another device");
  } else if (tensor.device_code() != kCodes.cuda || tensor.get_device_index() != index_) {
    fail(name, "on the cuda device of the other tensors",
         tensor.device_code() == kCodes.cpu ? "the cpu" : "another device");
  }
}

Dtype Checker::floating(const char* name, const Tensor& tensor) const {
  on_device(name, tensor);
  const int32_t code = tensor.dtype_code();
  if (code == kCodes.float32) return Dtype::kFloat32;
  if (code == kCodes.float16) return Dtype::kFloat16;
  if (code == kCodes.bfloat16) return Dtype::kBFloat16;
  fail(name, "float32, float16 or bfloat16", name_of(tensor.scalar_type()));
}

void Checker::dtype_as(const char* name, const Tensor& tensor, const char* other_name,
                       const Tensor& other) const {
  on_device(name, tensor);
  if (tensor.dtype_code() != other.dtype_code()) {
    fail(name, format(name_of(other.scalar_type()), " as ", other_name),
         name_of(tensor.scalar_type()));
  }
}

void Checker::int8(const char* name, const Tensor& tensor) const {
  on_device(name, tensor);
  if (tensor.dtype_code() != kCodes.int8) fail(name, "int8", name_of(tensor.scalar_type()));
}

void Checker::float32(const char* name, const Tensor& tensor) const {
  on_device(name, tensor);
  if (tensor.dtype_code() != kCodes.float32) {
    fail(name, "float32", name_of(tensor.scalar_type()));
  }
}

void Checker::dims(const char* name, const Tensor& tensor, int64_t expected) const {
  if (tensor.dim() != expected) {
    fail(name, format("a ", expected, "-D tensor"), format("shape ", shape_of(tensor)));
  }
}

void Checker::shape(const char* name, const Tensor& tensor, Sizes expected) const {
  const Sizes sizes = tensor.sizes();
  if (!std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end())) {
    fail(name, "of shape " + shape_text(expected), shape_of(tensor));
  }
}

void Checker::last_contiguous(const char* name, const Tensor& tensor) const {
  const Sizes strides = tensor.strides();
  if (strides.size() == 0 || strides.back() == 1 || tensor.sizes().back() <= 1) return;
  fail(name, "contiguous in its last dimension", format("stride ", strides.back()));
}

void Checker::contiguous(const char* name, const Tensor& tensor) const {
  if (!tensor.is_contiguous()) fail(name, "contiguous", "a strided tensor");
}

void Checker::not_expanded(const char* name, const Tensor& tensor) const {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  std::pair<int64_t, int64_t> steps[kMaxCacheDims];  // stride, size; by rising stride
  size_t count = 0;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] <= 1) continue;
    const std::pair step{strides[d], sizes[d]};
    size_t at = count++;
    for (; at > 0 && steps[at - 1] > step; --at) steps[at] = steps[at - 1];
    steps[at] = step;
  }
  int64_t extent = 0;  // distance from the first to the last element of the dimensions so far
  for (size_t i = 0; i < count; ++i) {
    const auto [stride, size] = steps[i];
    if (stride <= extent) fail(name, "without overlapping elements", "overlapping strides");
    extent += stride * (size - 1);
  }
}

namespace {

int64_t bytes_of(const Tensor& tensor) {
  const int32_t code = tensor.dtype_code();
  if (code == kCodes.int8 || code == kCodes.float8) return 1;
  return code == kCodes.float32 || code == kCodes.int32 ? 4 : 2;
}

// Whether distance = sum of steps[i].first * k[i] for some |k[i]| < steps[i].second. Each stride is
// longer than all before it together (Checker::not_expanded), so only two values of k fit.
bool reaches(const std::pair<int64_t, int64_t>* steps, size_t count, int64_t distance) {
  if (count == 0) return distance == 0;
  const auto [stride, size] = steps[count - 1];
  const int64_t down = distance / stride - (distance % stride < 0);
  for (const int64_t k : {down, down + 1}) {
    if (std::abs(k) < size && reaches(steps, count - 1, distance - k * stride)) return true;
  }
  return false;
}

}  // namespace

Extent extent_of(const Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  // A wrapper that only claims a device has no memory, and shares none.
  if (tensor.numel() == 0 || !begin) return {begin, begin};
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return {begin, begin + (last + 1) * bytes_of(tensor)};
}

void Checker::apart(const char* name, const Extent& extent, const char* other_name,
                    const Tensor& other) const {
  if (extent.meets(extent_of(other))) overlap(name, other_name);
}

void Checker::written_apart(const Extents& written,
                            std::initializer_list<NamedTensor> others) const {
  for (const auto& [name, tensor] : others) {
    if (!tensor) continue;
    const Extent extent = extent_of(*tensor);
    for (const auto& [written_name, written_extent] : written) {
      if (extent.meets(written_extent)) overlap(name, written_name);
    }
  }
}

void Checker::overlap(const char* name, const char* other_name) const {
  fail(name, format("in memory apart from ", other_name, "'s"), "overlapping memory");
}

void Checker::interleaved(const char* name, const Tensor& tensor, const char* other_name,
                          const Tensor& other) const {
  if (!extent_of(tensor).meets(extent_of(other))) return;
  const Sizes sizes = tensor.sizes(), strides = tensor.strides(), others = other.strides();
  std::pair<int64_t, int64_t> steps[kMaxCacheDims + 1];  // in bytes, by rising stride
  const int64_t bytes = bytes_of(tensor);
  steps[0] = {1, bytes};
  size_t count = 1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] <= 1) continue;
    if (strides[d] != others[d]) overlap(name, other_name);
    steps[count++] = {strides[d] * bytes, sizes[d]};
  }
  std::sort(steps, steps + count);
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  const auto* other_begin = static_cast<const char*>(other.const_data_ptr());
  if (reaches(steps, count, other_begin - begin)) overlap(name, other_name);
}

const int32_t* Checker::index(const char* name, const Tensor& tensor, int64_t size) const {
  on_device(name, tensor);
  if (tensor.dtype_code() != kCodes.int32) {
    fail(name, "int32", name_of(tensor.scalar_type()));
  }
  const Sizes sizes = tensor.sizes();
  if (sizes.size() != 1) dims(name, tensor, 1);
  if (size >= 0 && sizes[0] != size) shape(name, tensor, {size});
  fits_int32(name, sizes[0]);
  contiguous(name, tensor);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

const int32_t* Checker::index_rows(const char* name, const Tensor& tensor, int64_t rows) const {
  on_device(name, tensor);
  if (tensor.dtype_code() != kCodes.int32) {
    fail(name, "int32", name_of(tensor.scalar_type()));
  }
  dims(name, tensor, 2);
  if (tensor.sizes()[0] != rows) shape(name, tensor, {rows, tensor.sizes()[1]});
  fits_int32(name, tensor.sizes()[1]);
  last_contiguous(name, tensor);
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

Dtype Checker::cache_dtype(const Tensor& cache) const {
  const int32_t code = cache.dtype_code();
  if (code == kCodes.int8) return Dtype::kInt8;
  return code == kCodes.float8 ? Dtype::kFloat8 : floating("key_cache", cache);
}

KvScales Checker::scales(const Tensor& key_scale, const Tensor& value_scale,
                         const Tensor& key_cache, const Tensor& value_cache, bool written) const {
  const Sizes sizes = key_cache.sizes();
  const Sizes expected(sizes.data(), sizes.size() - 1);
  KvScales result;
  const auto take = [&](const char* name, const Tensor& scale, float*& data,
                        CacheStrides& strides) {
    float32(name, scale);
    shape(name, scale, expected);
    if (written) {
      not_expanded(name, scale);
      const Extent extent = extent_of(scale);
      apart(name, extent, "key_cache", key_cache);
      apart(name, extent, "value_cache", value_cache);
    }
    const int64_t* s = scale.strides().data() + (expected.size() - 3);
    strides = {expected.size() == 4 ? s[-1] : 0, s[0], s[1], s[2]};
    data = written ? static_cast<float*>(scale.mutable_data_ptr())
                   : const_cast<float*>(static_cast<const float*>(scale.const_data_ptr()));
  };
  take("key_scale", key_scale, result.key, result.key_strides);
  take("value_scale", value_scale, result.value, result.value_strides);
  if (written) interleaved("value_scale", value_scale, "key_scale", key_scale);
  return result;
}

CacheSizes Checker::caches(const Tensor& key_cache, const Tensor& value_cache, bool with_layers,
                           bool written, bool has_scales) const {
  if (has_scales) {
    on_device("key_cache", key_cache);
    const int32_t code = key_cache.dtype_code();
    if (type_ != DeviceType::CPU) {
      fail("key_cache",
           "float32, float16 or bfloat16 with the CUDA kernels (those of the CPU take "
           "eight bits and scales)",
           "key_scale and value_scale");
    }
    if (code != kCodes.int8 && code != kCodes.float8) {
      fail("key_cache", "int8 or float8_e4m3fn with key_scale and value_scale",
           name_of(key_cache.scalar_type()));
    }
  } else if (key_cache.dtype_code() == kCodes.int8 || key_cache.dtype_code() == kCodes.float8) {
    fail("key_scale and value_scale",
         format("given with a cache of ", name_of(key_cache.scalar_type())), "None");
  } else {
    floating("key_cache", key_cache);
  }
  dtype_as("value_cache", value_cache, "key_cache", key_cache);
  const Sizes sizes = key_cache.sizes();
  const size_t dims = sizes.size();
  if (dims != 4 && !(with_layers && dims == kMaxCacheDims)) {
    fail("key_cache",
         with_layers ? "[num_slots, num_kv_heads, capacity, head_dim] with an optional leading "
                       "num_layers"
                     : "[num_slots, num_kv_heads, capacity, head_dim]",
         format("shape ", shape_of(key_cache)));
  }
  shape("value_cache", value_cache, sizes);
  last_contiguous("key_cache", key_cache);
  last_contiguous("value_cache", value_cache);
  CacheSizes result;
  result.num_layers = dims == 5 ? sizes[0] : 1;
  result.num_slots = sizes[dims - 4];
  result.num_kv_heads = sizes[dims - 3];
  result.capacity = sizes[dims - 2];
  result.head_dim = sizes[dims - 1];
  if (result.head_dim < 16 || result.head_dim > 256 || result.head_dim % 8 != 0) {
    fail("head_dim", "a multiple of 8 from 16 to 256", format(result.head_dim));
  }
  if (result.num_kv_heads < 1) fail("num_kv_heads", "at least 1", format(result.num_kv_heads));
  fits_int32("capacity", result.capacity);
  fits_int32("num_slots", result.num_slots);
  if (written) {
    not_expanded("key_cache", key_cache);
    not_expanded("value_cache", value_cache);
    interleaved("value_cache", value_cache, "key_cache", key_cache);
  }
  return result;
}

void Checker::cumulative(const char* name, const int32_t* values, int64_t count, int64_t total,
                         const char* total_name) const {
  if (count < 1) fail(name, "of at least one element", "shape [0]");
  if (values[0] != 0) fail(format(name, "[0]"), "0", format(values[0]));
  for (int64_t i = 1; i < count; ++i) {
    if (values[i] < values[i - 1]) {
      fail(name, "non-decreasing", format(values[i - 1], " before ", values[i]));
    }
  }
  if (values[count - 1] != total) {
    fail(format(name, "[-1]"), format(total_name, " = ", total), format(values[count - 1]));
  }
}

std::pair<int32_t, int32_t> find_overlap(std::vector<ColumnRange>& ranges) {
  ranges.erase(std::remove_if(ranges.begin(), ranges.end(),
                              [](const ColumnRange& r) { return r.begin == r.end; }),
               ranges.end());
  std::sort(ranges.begin(), ranges.end(), [](const ColumnRange& a, const ColumnRange& b) {
    return a.slot != b.slot ? a.slot < b.slot : a.begin < b.begin;
  });
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].slot == ranges[i - 1].slot && ranges[i].begin < ranges[i - 1].end) {
      return {ranges[i - 1].entry, ranges[i].entry};
    }
  }
  return {-1, -1};
}

CacheStrides cache_strides(const Tensor& cache) {
  const Sizes strides = cache.strides();
  const int64_t* s = strides.data() + (strides.size() - 4);
  return {strides.size() == kMaxCacheDims ? strides[0] : 0, s[0], s[1], s[2]};
}

TokenStrides token_strides(const Tensor& tokens) {
  const Sizes strides = tokens.strides();
  const int64_t* s = strides.data() + (strides.size() - 3);
  return {strides.size() == 4 ? strides[0] : 0, s[0], s[1]};
}

}  // namespace baton::bindings
