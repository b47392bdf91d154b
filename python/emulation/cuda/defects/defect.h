// Kernels that are wrong on purpose, to test the judges. Each file has one kernel that is right
// with `wrong` false and has one mistake with it true.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "cuda/device/device.h"

namespace defects {

// Runs the kernel once, on new arrays; false when the result is wrong.
using Run = bool (*)(bool wrong);

EMULATION_UNTRACKED inline std::map<std::string, Run>& all() {
  static std::map<std::string, Run> value;
  return value;
}

struct Register {
  Register(const char* name, Run run) { all()[name] = run; }
};

// An array on the heap, of exactly its size and known to the judge.
struct Array {
  std::vector<float> values;
  explicit Array(const char* name, size_t size, float value = 0) : values(size, value) {
    emulation::judge::add_region(name, values.data(), size * sizeof(float), true);
  }
  ~Array() { emulation::judge::clear_regions(); }
  operator float*() { return values.data(); }
};

}  // namespace defects

#define DEFECT(name)                                           \
  static bool name(bool wrong);                                \
  static const defects::Register register_##name(#name, name); \
  static bool name(bool wrong)
