// Registers a C++ function of Tensors as an op's kernel, as TORCH_BOX does, but for a Tensor that
// is not a shared pointer. Tensors are taken as `const Tensor&`.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "bindings/tensors.h"

namespace baton::bindings {

namespace boxing {

namespace stable = torch::stable::detail;

// The stack owns its arguments until they are read, and owns the results once they are written.
template <typename T>
struct Argument {
  static T read(StableIValue value) { return stable::to<T>(value); }
};
template <>
struct Argument<Tensor> {
  static Tensor read(StableIValue value) { return Tensor(stable::to<AtenTensorHandle>(value)); }
};
template <>
struct Argument<std::optional<Tensor>> {
  static std::optional<Tensor> read(StableIValue value) {
    std::optional<Tensor> tensor;
    if (const auto handle = stable::to<std::optional<AtenTensorHandle>>(value)) {
      tensor.emplace(*handle);
    }
    return tensor;
  }
};

inline void write(StableIValue* stack, Tensor result) { stack[0] = stable::from(result.release()); }
inline void write(StableIValue* stack, std::tuple<Tensor, Tensor> results) {
  stack[0] = stable::from(std::get<0>(results).release());
  stack[1] = stable::from(std::get<1>(results).release());
}

template <auto kFunction>
struct Boxed;
template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Boxed<kFunction> {
  static void run(StableIValue* stack, uint64_t, uint64_t) {
    apply(stack, std::index_sequence_for<Arguments...>());
  }

 private:
  template <size_t... kIndices>
  static void apply(StableIValue* stack, std::index_sequence<kIndices...>) {
    std::tuple<std::remove_cvref_t<Arguments>...> arguments{
        Argument<std::remove_cvref_t<Arguments>>::read(stack[kIndices])...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(kFunction, arguments);
    } else {
      write(stack, std::apply(kFunction, arguments));
    }
  }
};

}  // namespace boxing

// torch copies lazily negated arguments and afterwards writes the results back. For an op that also
// returns something it cannot do so, and it fails only after the op has written.
template <auto kFunction>
struct Lazy;
template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Lazy<kFunction> {
  static Result refuse(Arguments...) {
    throw std::invalid_argument(
        "baton_kernels: tensors of an op that writes must hold their values, got one that is "
        "negated lazily: resolve_neg() it");
  }
};

template <auto kFunction>
constexpr auto box_lazy = &boxing::Boxed<&Lazy<kFunction>::refuse>::run;

template <auto kFunction>
constexpr auto box = &boxing::Boxed<kFunction>::run;

}  // namespace baton::bindings
