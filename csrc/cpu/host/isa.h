// Instruction sets: which ones this build has, which ones this CPU has, which one is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace baton::cpu {

struct Isa {
  const char* name;
  bool compiled;
  bool found;  // the running CPU (and its operating system) can execute it
};

// From the plainest to the best.
const std::vector<Isa>& isas();

// The kernels in use: the best set that is both compiled and found, unless set_isa chose another.
const KernelTable& kernels();
const char* isa_in_use();

// How many bytes before their use linear_packed prefetches weights that one pass of rows reads; 0
// where the CPU's own prefetching does better without.
int64_t read_ahead_bytes();

// Chooses a set by name, or the best one with "auto". False if it is not compiled or not found.
// With `force` a set that is not found is chosen too: its kernels end the process unless something
// handles the instructions that the CPU refuses.
bool set_isa(const std::string& name, bool force);

}  // namespace baton::cpu
