// pack_linear and unpack_linear on the CPU: copy elements to and from panels
// (common/linear_packed.h).
#include "cpu/kernels.h"
#include "cpu/simd/simd.h"

namespace baton::cpu::BATON_ISA {

namespace {

// Steps of a panel that stay in the first-level cache while all outputs are copied.
constexpr int64_t kStepsAtOnce = 32;

// The index of element k of output i within a panel.
template <int kTerms>
BATON_INLINE int64_t place(int64_t i, int64_t k) {
  return (k / kTerms * kPanelOutputs + i) * kTerms + k % kTerms;
}

// Calls fn(k, k_end) for each stretch of in_features.
template <int kTerms, typename Fn>
void each_stretch(int64_t in_features, Fn&& fn) {
  constexpr int64_t kLength = kStepsAtOnce * kTerms;
  for (int64_t k = 0; k < in_features; k += kLength) {
    fn(k, k + kLength < in_features ? k + kLength : in_features);
  }
}

// Items are panels.
template <typename T, int kTerms>
void pack(const PackLinearParams& p, int64_t begin, int64_t end) {
  const int64_t size = panel_bytes(p.layout, p.in_features) / sizeof(T);
  for (int64_t panel = begin; panel < end; ++panel) {
    T* out = static_cast<T*>(p.panels) + panel * size;
    const int64_t first = panel * kPanelOutputs;
    const int64_t rest = p.out_features - first;
    const int64_t outputs = rest < kPanelOutputs ? rest : kPanelOutputs;
    if (outputs < kPanelOutputs || p.in_features % kTerms > 0) {
      __builtin_memset(out, 0, size * sizeof(T));
    }
    const T* weight = static_cast<const T*>(p.weight) + first * p.weight_row_stride;
    each_stretch<kTerms>(p.in_features, [&](int64_t k_begin, int64_t k_end) {
      for (int64_t i = 0; i < outputs; ++i) {
        const T* from = weight + i * p.weight_row_stride;
        for (int64_t k = k_begin; k < k_end; ++k) out[place<kTerms>(i, k)] = from[k];
      }
    });
  }
}

// Items are outputs.
template <typename T, int kTerms>
void unpack(const UnpackLinearParams& p, int64_t begin, int64_t end) {
  const int64_t size = panel_bytes(p.layout, p.in_features) / sizeof(T);
  // One panel's number of outputs at a time.
  for (; begin < end; begin += kPanelOutputs) {
    const int64_t last = begin + kPanelOutputs < end ? begin + kPanelOutputs : end;
    each_stretch<kTerms>(p.in_features, [&](int64_t k_begin, int64_t k_end) {
      for (int64_t i = begin; i < last; ++i) {
        const int64_t output = p.outputs ? p.outputs[i] : i;
        const T* panel = static_cast<const T*>(p.panels) + output / kPanelOutputs * size;
        T* to = static_cast<T*>(p.weight) + i * p.in_features;
        for (int64_t k = k_begin; k < k_end; ++k) {
          to[k] = panel[place<kTerms>(output % kPanelOutputs, k)];
        }
      }
    });
  }
}

// Calls fn.operator()<T, kTerms>() with a T of the element's size.
template <typename Fn>
void dispatch_layout(const PanelLayout& layout, Fn&& fn) {
  dispatch_int<1, 2, 4>(layout.terms, [&]<int kTerms>() {
    if (layout.element_bytes == 4) return fn.template operator()<uint32_t, kTerms>();
    if (layout.element_bytes == 2) return fn.template operator()<uint16_t, kTerms>();
    if (layout.element_bytes == 1) return fn.template operator()<uint8_t, kTerms>();
    dispatch_failed("bytes of an element", layout.element_bytes);
  });
}

}  // namespace

void pack_linear(const PackLinearParams& p, int64_t begin, int64_t end) {
  dispatch_layout(p.layout, [&]<typename T, int kTerms>() { pack<T, kTerms>(p, begin, end); });
}

void unpack_linear(const UnpackLinearParams& p, int64_t begin, int64_t end) {
  dispatch_layout(p.layout, [&]<typename T, int kTerms>() { unpack<T, kTerms>(p, begin, end); });
}

}  // namespace baton::cpu::BATON_ISA
