// The judge watches every memory access of a kernel: races, reads of what was never written, places
// outside of all tensors; and it counts sectors and wavefronts.
//
// The compiler calls it: kernels built with -fsanitize=thread announce every load and store to
// functions named __tsan_*, and in the judged build those are defined in judge.cpp. In other builds
// everything here is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

// Code of the emulator itself, as far as it is compiled together with a kernel.
#define EMULATION_UNTRACKED __attribute__((no_sanitize("thread")))

namespace emulation::judge {

#if defined(EMULATION_JUDGE)
constexpr bool kEnabled = true;
// Behind: what the launch before has touched is not over until a thread has waited for it.
void begin_launch(bool behind);
void end_launch();
void begin_block(unsigned char* shared, std::size_t shared_bytes);
void end_block();
void access(const void* address, unsigned bytes, bool write, const void* site);
void atomic(const void* address, unsigned bytes, const void* site);
// Orders what came before among the lanes of the mask.
void sync_warp(unsigned warp, unsigned mask);
void sync_block();
// A copy in flight: until `landed`, the target belongs to the copy.
void copy_begins(void* target, const void* source, unsigned bytes, unsigned source_bytes,
                 const void* site);
void copy_landed(void* target, unsigned bytes);
void fence();
void wait_for_grid_before();
// Order through a word, as an mbarrier is: what its releases until the end of a phase knew is known
// to those who acquire it after that.
void release(const void* word);
void end_phase(const void* word);
void acquire(const void* word);
// Products may read what is known to be written from here on.
void fence_proxy();
void product_reads(const void* address, unsigned bytes, const void* site);
// Memory that a kernel may touch; with no region added, the judge does not ask.
void add_region(const std::string& name, const void* address, std::size_t bytes, bool writable);
void clear_regions();
#else
constexpr bool kEnabled = false;
inline void begin_launch(bool) {}
inline void end_launch() {}
inline void begin_block(unsigned char*, std::size_t) {}
inline void end_block() {}
inline void access(const void*, unsigned, bool, const void*) {}
inline void atomic(const void*, unsigned, const void*) {}
inline void sync_warp(unsigned, unsigned) {}
inline void sync_block() {}
inline void copy_begins(void*, const void*, unsigned, unsigned, const void*) {}
inline void copy_landed(void*, unsigned) {}
inline void fence() {}
inline void wait_for_grid_before() {}
inline void release(const void*) {}
inline void end_phase(const void*) {}
inline void acquire(const void*) {}
inline void fence_proxy() {}
inline void product_reads(const void*, unsigned, const void*) {}
inline void add_region(const std::string&, const void*, std::size_t, bool) {}
inline void clear_regions() {}
#endif

}  // namespace emulation::judge
