// Instruction sets: which ones this build has, which ones this CPU has, which one is used.
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

// The kernels in use: the best compiled and found set, unless set_isa has chosen.
const KernelTable& kernels();
const char* isa_in_use();

// How far ahead of their use linear_packed asks for weights that one pass of rows reads; 0 where
// the CPU foresees such reads best by itself.
int64_t read_ahead_bytes();

// Chooses a set by name, or the best with "auto". False when it is not compiled, or not found; with
// force also one that is not found: its kernels end the process, unless somebody catches what the
// CPU refuses.
bool set_isa(const std::string& name, bool force);

}  // namespace baton::cpu
