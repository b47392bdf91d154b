// quantize_linear on the CPU: rounds rows to int8, with a scale per row or per group of elements
// (common/linear_packed.h). One work item is one row, read twice from the core's private cache.
//
// Maxima and integers are exact and the rest is one operation per element, so every instruction set
// computes the same bits.
#include "cpu/kernels.h"
#include "cpu/simd/bytes.h"

namespace baton::cpu::BATON_ISA {

namespace {

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kLargest = 127.0f;
// Adding it to a number below 2^22 leaves the nearest integer in the lowest bits.
constexpr float kRounder = 0x1.8p23f;
constexpr int32_t kRounderBits = 0x4b400000;

// The bits of the largest magnitude. Bits sort like the magnitudes, with NaN after infinity.
template <typename T>
BATON_INLINE uint32_t largest_bits(const T* x, int64_t size) {
  const auto larger = [](IntVec most, Vec v) BATON_INLINE_LAMBDA {
    const IntVec bits = (IntVec)(as_bits(v) & 0x7fffffffu);
    return bits > most ? bits : most;
  };
  IntVec most[2] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= size; k += 2 * kLanes) {
    most[0] = larger(most[0], load(x + k));
    most[1] = larger(most[1], load(x + k + kLanes));
  }
  for (; k + kLanes <= size; k += kLanes) most[0] = larger(most[0], load(x + k));
  if (k < size) most[1] = larger(most[1], load_partial(x + k, size - k));
  return static_cast<uint32_t>(reduce_max(most[0] > most[1] ? most[0] : most[1]));
}

// Writes the rounded elements; returns their sum, modulo 2^32 if there are more than a group.
template <typename T>
BATON_INLINE uint32_t round_elements(const T* x, int64_t size, float inverse, int8_t* rounded) {
  const Vec factor = set1(inverse), rounder = set1(kRounder);
  const auto nearest = [&](Vec v) BATON_INLINE_LAMBDA {
    return (IntVec)as_bits(v * factor + rounder) - kRounderBits;
  };
  UintVec sums = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    const IntVec q = nearest(load(x + k));
    sums += (UintVec)q;
    store_bytes(rounded + k, q);
  }
  if (const int64_t rest = size - k; rest > 0) {
    const IntVec q = nearest(load_partial(x + k, rest));
    sums += (UintVec)q;
    int8_t buffer[kLanes];
    store_bytes(buffer, q);
    for (int64_t i = 0; i < rest; ++i) rounded[k + i] = buffer[i];
  }
  return reduce_sum(sums);
}

template <typename T>
BATON_INLINE QuantizedGroup quantize_group(const T* x, int64_t size, int8_t* rounded) {
  const uint32_t bits = largest_bits(x, size);
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(largest));
  QuantizedGroup group{0.0f, 0};
  if (bits >= kInfinityBits) {
    group.scale = __builtin_nanf("");
  } else if (const float inverse = kLargest / largest; inverse <= __FLT_MAX__) {
    // 0, and magnitudes so small that the factor would be infinite, are excluded.
    group.scale = largest / kLargest;
    const uint32_t sum = round_elements(x, size, inverse, rounded);
    group.first_sum = static_cast<int32_t>(0u - kByteOffset * sum);
    return group;
  }
  if (size > 0) __builtin_memset(rounded, 0, size);
  return group;
}

template <typename T>
BATON_INLINE QuantizedGroup with_headroom(const T* x, int64_t size, int8_t* rounded) {
  QuantizedGroup group = quantize_group(x, size, rounded);
  group.scale /= kInt8Headroom;
  return group;
}

template <typename T>
void quantize_row(const QuantizeLinearParams& p, int64_t row) {
  const T* x = static_cast<const T*>(p.x) + row * p.x_row_stride;
  int8_t* rounded = p.rounded + row * p.rounded_row_stride;
  if (p.scales) p.scales[row] = quantize_group(x, p.in_features, rounded).scale;
  if (p.groups) {
    QuantizedGroup* groups = p.groups + row * num_int8_groups(p.in_features);
    int64_t k = 0;
    for (; k + kInt8Group <= p.in_features; k += kInt8Group) {
      *groups++ = with_headroom(x + k, kInt8Group, rounded + k);
    }
    if (k < p.in_features) *groups = with_headroom(x + k, p.in_features - k, rounded + k);
  }
  // A row without features has no memory, and memset must not be given null.
  const int64_t rest = p.row_size - p.in_features;
  if (rest > 0) __builtin_memset(rounded + p.in_features, 0, rest);
}

}  // namespace

void quantize_linear(const QuantizeLinearParams& p, int64_t begin, int64_t end) {
  dispatch_dtype(p.dtype, [&]<typename T>() {
    for (int64_t row = begin; row < end; ++row) quantize_row<T>(p, row);
  });
}

}  // namespace baton::cpu::BATON_ISA
