// The table of one instruction set's kernels, which host/isa.cpp chooses from at run time.
#include "cpu/kernels.h"

namespace baton::cpu::BATON_ISA {

extern const KernelTable kKernelTable;
const KernelTable kKernelTable = {
#define BATON_ENTRY(name, ...) &name,
    BATON_FOR_EACH_KERNEL(BATON_ENTRY)
#undef BATON_ENTRY
};

}  // namespace baton::cpu::BATON_ISA
