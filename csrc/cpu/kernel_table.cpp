// The table of one instruction set's kernels, which host/isa.cpp chooses from at run time.
#include "cpu/kernels.h"
#include "cpu/simd/amx.h"

namespace baton::cpu::BATON_ISA {

extern const KernelTable kKernelTable;
const KernelTable kKernelTable = {
#if defined(BATON_HAS_TILES)
    .packs_bfloat16 = true,
#else
    .packs_bfloat16 = false,
#endif
    .packed_parts = kPackedParts,
#define BATON_ENTRY(name, ...) .name = &name,
    BATON_FOR_EACH_KERNEL(BATON_ENTRY)
#undef BATON_ENTRY
};

}  // namespace baton::cpu::BATON_ISA
