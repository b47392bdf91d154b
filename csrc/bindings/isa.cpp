// The instruction set that the CPU kernels use: reported by build_info, overridden by tests.
#include "cpu/host/isa.h"

#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"

namespace baton::bindings {

void set_cpu_isa(std::string name, bool force) {
  if (!cpu::set_isa(name, force)) {
    Checker("set_cpu_isa")
        .fail("name", "\"auto\" or an instruction set that is compiled and found", name);
  }
}

// One line "name compiled found used" per instruction set, numbers 0 or 1.
std::string cpu_isas() {
  std::string text;
  for (const cpu::Isa& isa : cpu::isas()) {
    text += format(isa.name, " ", isa.compiled, " ", isa.found, " ",
                   std::string(isa.name) == cpu::isa_in_use(), "\n");
  }
  return text;
}

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CompositeExplicitAutograd, library) {
  library.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  library.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace baton::bindings
