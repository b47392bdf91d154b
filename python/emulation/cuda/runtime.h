// The machine that emulated kernels run on: one fiber per thread of a block, one block at a time.
//
// A fiber runs until it waits at a barrier or a warp-wide operation; then the next one in the
// chosen order goes on. Everything is deterministic for given options.
#pragma once

#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulation/cuda/judge.h"

namespace emulation {

enum class Order : int { kForward, kBackward, kShuffled };

struct Options {
  Order threads = Order::kForward;  // lanes of a warp
  Order warps = Order::kForward;
  Order blocks = Order::kForward;
  bool late_copies = false;  // cp.async arrives when it is waited for, not at once
  uint64_t seed = 1;         // of kShuffled
};
Options& options();

// Reports of the launches since the last call, each once; empties the list.
std::vector<std::string> take_reports();
// Records a report. The launch goes on.
void report(const std::string& text);
// Records a report and ends the launch: nothing sensible can follow. Only inside a kernel.
[[noreturn]] void fail(const std::string& text);

// The judge's, for code that is compiled once for all variants.
void add_region(const std::string& name, const void* address, std::size_t bytes, bool writable);
void clear_regions();

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
// Few, so that each block of a grid that is sized by them has several items.
constexpr int kMultiprocessors = 2;
// As on sm_90 and sm_100: the most a block may request.
constexpr std::size_t kMaxSharedBytes = 227 * 1024;

// Where the running thread stands; what threadIdx, blockIdx, blockDim and gridDim read.
struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
  unsigned linear, warp, lane;  // of the thread in its block
};
extern Place place;

using Where = std::source_location;

// Every thread of the block waits here.
void block_barrier(Where where);

// One operation of all lanes of `mask`. The last lane to arrive runs `run` with the data of every
// lane (null outside the mask); then all go on.
using WarpFunction = void (*)(void* const* lanes, unsigned mask);
// Only __syncwarp orders memory; CUDA promises it for nothing else.
void warp_operation(unsigned mask, WarpFunction run, void* data, const char* name, Where where,
                    bool orders_memory = false);

// The running thread stays behind until somebody wakes those who wait for this word.
void wait_for(const void* word, const char* name, Where where);
void wake(const void* word);

// cp.async of the running thread: copied now or when waited for.
void copy_async(void* target, const void* source, unsigned bytes, unsigned source_bytes,
                const void* site);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

// An atomic is about to happen. After a fence of its block, other blocks' atomics at the same
// address come after what the block has done.
void announce_atomic(void* address, unsigned bytes, const void* site);
void fence();

// The running thread waits for the grid that its own was launched behind.
void wait_for_grid_before();

// Dynamic shared memory of the running block: exactly the bytes requested.
extern unsigned char* dynamic_shared;
extern std::size_t dynamic_shared_bytes;

// A load or store of `bytes` in one instruction, which must be aligned to them.
void load(void* registers, const void* memory, unsigned bytes, const void* site);
void store(void* memory, const void* registers, unsigned bytes, const void* site);

// A launch that was made while recording; its arguments are raw bytes.
struct Recording {
  const void* kernel;
  dim3 grid, block;
  std::size_t shared_bytes;
  bool behind;  // programmatic dependent launch
  std::vector<std::string> arguments;
  std::function<cudaError_t()> again;  // the same launch once more
};
// Null: nothing is recorded.
extern std::vector<Recording>* recordings;
// While a graph is captured, launches are recorded and do not run.
extern bool capturing;

struct Kernel {
  void (*invoke)(const void* function, const void* arguments);
  const void* function;
  const void* arguments;
};
cudaError_t run(const Kernel& kernel, dim3 grid, dim3 block, std::size_t shared_bytes, bool behind);

template <typename... Params, typename... Args>
EMULATION_UNTRACKED cudaError_t launch_as(bool behind, void (*kernel)(Params...), dim3 grid,
                                          dim3 block, std::size_t shared_bytes,
                                          const Args&... args) {
  const auto invoke = [](const void* function, const void* values) EMULATION_UNTRACKED {
    std::apply(reinterpret_cast<void (*)(Params...)>(const_cast<void*>(function)),
               *static_cast<const std::tuple<Params...>*>(values));
  };
  const std::tuple<Params...> given(args...);
  const auto launch_once = [=]() EMULATION_UNTRACKED {
    // The judge knows the arguments by their place on the launching thread's stack.
    const std::tuple<Params...> arguments = given;
    return run({invoke, reinterpret_cast<const void*>(kernel), &arguments}, grid, block,
               shared_bytes, behind);
  };
  if (recordings) {
    Recording recording{
        reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, behind, {}, launch_once};
    std::apply(
        [&](const auto&... value) {
          (recording.arguments.emplace_back(reinterpret_cast<const char*>(&value), sizeof(value)),
           ...);
        },
        given);
    recordings->push_back(std::move(recording));
  }
  return capturing ? cudaSuccess : launch_once();
}

template <typename... Params, typename... Args>
EMULATION_UNTRACKED cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block,
                                       std::size_t shared_bytes, cudaStream_t,
                                       const Args&... args) {
  return launch_as(false, kernel, grid, block, shared_bytes, args...);
}
// Blocks do not run before the grid before has ended, but are held to having waited for it.
template <typename... Params, typename... Args>
EMULATION_UNTRACKED cudaError_t launch_behind(void (*kernel)(Params...), dim3 grid, dim3 block,
                                              std::size_t shared_bytes, cudaStream_t,
                                              const Args&... args) {
  return launch_as(true, kernel, grid, block, shared_bytes, args...);
}

}  // namespace emulation
