// The Python module of the emulated kernels: each op takes its Params struct, filled in by ops.py.
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <type_traits>

#include "cuda/kernels.h"
#include "emulation/cuda/counters.h"
#include "emulation/cuda/runtime.h"

namespace py = pybind11;

namespace {

template <typename T>
void assign(T& target, const py::object& value) {
  if constexpr (std::is_pointer_v<T>) {
    target = reinterpret_cast<T>(value.cast<uintptr_t>());
  } else if constexpr (std::is_enum_v<T>) {
    target = static_cast<T>(value.cast<int>());
  } else if constexpr (std::is_arithmetic_v<T>) {
    target = value.cast<T>();
  } else {
    // Sizes and strides: structs of int64_t only, in order.
    const auto values = value.cast<std::vector<int64_t>>();
    if (values.size() * sizeof(int64_t) != sizeof(T))
      throw py::value_error("wrong number of sizes");
    std::memcpy(static_cast<void*>(&target), values.data(), sizeof(T));
  }
}

// The launches of one call, captured as a CUDA graph does it: nothing has run, and every run is of
// only the launches, without the host code that made them.
struct Graph {
  std::vector<emulation::Recording> launches;

  std::pair<int, std::vector<std::string>> run() const {
    for (const auto& launch : launches) {
      const cudaError_t error = launch.again();
      if (error != cudaSuccess) return {static_cast<int>(error), emulation::take_reports()};
    }
    return {0, emulation::take_reports()};
  }
};

// Params of one op as a Python class whose fields can be set.
template <typename Params>
struct Binding {
  py::class_<Params> python;

  Binding(py::module_& m, const char* op, cudaError_t (*kernel)(const Params&, cudaStream_t))
      : python(m, op, py::module_local()) {
    python.def(py::init([] { return Params{}; }));
    python.def("run", [kernel](const Params& p) {
      const cudaError_t error = kernel(p, nullptr);
      return std::pair(static_cast<int>(error), emulation::take_reports());
    });
    python.def("capture", [kernel](const Params& p) {
      Graph graph;
      emulation::recordings = &graph.launches;
      emulation::capturing = true;
      const cudaError_t error = kernel(p, nullptr);
      emulation::capturing = false;
      emulation::recordings = nullptr;
      return std::pair(static_cast<int>(error), graph);
    });
  }
  template <typename T>
  Binding& operator()(const char* name, T Params::* field) {
    python.def_property(
        name, [](const Params&) { return py::none(); },
        [field](Params& p, const py::object& value) { assign(p.*field, value); });
    return *this;
  }
};

py::dict as_dict(const std::map<std::string, emulation::counting::Traffic>& traffic) {
  py::dict result;
  for (const auto& [region, t] : traffic) {
    py::dict entry;
    entry["requests"] = t.requests;
    entry["bytes"] = t.bytes;
    entry["sectors"] = t.sectors;
    entry["wavefronts"] = t.wavefronts;
    entry["ideal_wavefronts"] = t.ideal;
    result[region.c_str()] = entry;
  }
  return result;
}

}  // namespace

#define FIELD(name) (#name, &P::name)

static void bind(py::module_& m) {
  using namespace baton;
  py::class_<Graph>(m, "Graph", py::module_local()).def("run", &Graph::run);
  {
    using P = InsertKvParams;
    Binding<P>(m, "insert_kv", cuda::insert_kv) FIELD(key) FIELD(value) FIELD(key_cache)
        FIELD(value_cache) FIELD(cu_seqlens) FIELD(slots) FIELD(starts) FIELD(num_queries)
            FIELD(total_tokens) FIELD(sizes) FIELD(key_strides) FIELD(value_strides)
                FIELD(key_cache_strides) FIELD(value_cache_strides) FIELD(dtype)
                    FIELD(zero_padding);
  }
  {
    using P = ExtractKvParams;
    Binding<P>(m, "extract_kv", cuda::extract_kv) FIELD(key) FIELD(value) FIELD(key_cache)
        FIELD(value_cache) FIELD(cu_seqlens) FIELD(slots) FIELD(starts) FIELD(num_queries)
            FIELD(total_tokens) FIELD(sizes) FIELD(key_strides) FIELD(value_strides)
                FIELD(key_cache_strides) FIELD(value_cache_strides) FIELD(dtype);
  }
  {
    using P = AppendKvParams;
    Binding<P>(m, "append_kv", cuda::append_kv) FIELD(key) FIELD(value) FIELD(query)
        FIELD(rotated_query) FIELD(key_cache) FIELD(value_cache) FIELD(slots) FIELD(columns)
            FIELD(cos) FIELD(sin) FIELD(num_rows) FIELD(num_heads) FIELD(rotary_dim)
                FIELD(cos_row_stride) FIELD(sin_row_stride) FIELD(sizes) FIELD(key_strides)
                    FIELD(value_strides) FIELD(query_strides) FIELD(key_cache_strides)
                        FIELD(value_cache_strides) FIELD(dtype) FIELD(rotary_dtype);
  }
  {
    using P = MoveKvParams;
    Binding<P>(m, "move_kv", cuda::move_kv) FIELD(key_cache) FIELD(value_cache) FIELD(source_slots)
        FIELD(source_starts) FIELD(target_slots) FIELD(target_starts) FIELD(lengths)
            FIELD(num_moves) FIELD(sizes) FIELD(key_cache_strides) FIELD(value_cache_strides)
                FIELD(dtype);
  }
  {
    using P = MergeAttentionParams;
    Binding<P>(m, "merge_attention", cuda::merge_attention) FIELD(out_a) FIELD(out_b) FIELD(lse_a)
        FIELD(lse_b) FIELD(out) FIELD(lse) FIELD(num_queries) FIELD(num_heads) FIELD(head_dim)
            FIELD(out_a_strides) FIELD(out_b_strides) FIELD(dtype);
  }
  {
    using P = IndicesParams;
    Binding<P>(m, "fill_indices", cuda::fill_indices) FIELD(values) FIELD(num_rows);
  }
  {
    using P = RaggedAttentionParams;
    Binding<P> binding(m, "ragged_attention", cuda::ragged_attention);
    binding FIELD(query) FIELD(key_cache) FIELD(value_cache) FIELD(out) FIELD(lse) FIELD(cu_seqlens)
        FIELD(slots) FIELD(starts) FIELD(lengths) FIELD(alibi_slopes) FIELD(sinks)
            FIELD(block_table) FIELD(block_table_stride) FIELD(max_pages) FIELD(num_rows)
                FIELD(num_heads) FIELD(sizes) FIELD(query_strides) FIELD(key_cache_strides)
                    FIELD(value_cache_strides) FIELD(scale) FIELD(softcap) FIELD(window)
                        FIELD(causal) FIELD(dtype) FIELD(total_queries) FIELD(max_query_length)
                            FIELD(max_length) FIELD(prefill) FIELD(workspace);
    binding.python.def("workspace_floats", cuda::ragged_attention_workspace);
  }

  m.def("set_options", [](int threads, int warps, int blocks, bool late_copies, uint64_t seed) {
    using emulation::Order;
    emulation::options() = {static_cast<Order>(threads), static_cast<Order>(warps),
                            static_cast<Order>(blocks), late_copies, seed};
  });
  m.def("add_region", [](const std::string& name, uintptr_t address, size_t bytes, bool writable) {
    emulation::add_region(name, reinterpret_cast<void*>(address), bytes, writable);
  });
  m.def("clear_regions", emulation::clear_regions);
  m.def("record", [](const py::function& calls) {
    std::vector<emulation::Recording> launches;
    emulation::recordings = &launches;
    try {
      calls();
    } catch (...) {
      emulation::recordings = nullptr;
      throw;
    }
    emulation::recordings = nullptr;
    py::list result;
    const auto sizes = [](dim3 d) { return py::make_tuple(d.x, d.y, d.z); };
    for (const auto& launch : launches) {
      py::list arguments;
      for (const auto& bytes : launch.arguments) arguments.append(py::bytes(bytes));
      // Where in this file the kernel is: `nm` has its name.
      Dl_info info{};
      dladdr(launch.kernel, &info);
      const auto offset =
          reinterpret_cast<uintptr_t>(launch.kernel) - reinterpret_cast<uintptr_t>(info.dli_fbase);
      result.append(py::make_tuple(offset, sizes(launch.grid), sizes(launch.block),
                                   launch.shared_bytes, arguments, launch.behind));
    }
    return result;
  });
  m.def("take_counters", [] {
    const auto counters = std::exchange(emulation::counting::counters(), {});
    return std::pair(as_dict(counters.loads), as_dict(counters.stores));
  });
}

// Entries of all modules in one object. Each has its own name: to pybind11 a second module of
// one name is the first.
PYBIND11_MODULE(emulated_fast, m) { bind(m); }
PYBIND11_MODULE(emulated_judged, m) { bind(m); }
