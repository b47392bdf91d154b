// Chooses the threads that the CPU kernels run on.
#include <torch/csrc/stable/library.h>

#include "bindings/parallel.h"

namespace baton::bindings {

void use_torch_threads(bool use) { takes_torch_threads.store(use, std::memory_order_relaxed); }

STABLE_TORCH_LIBRARY_IMPL(baton_kernels, CompositeExplicitAutograd, library) {
  library.impl("use_torch_threads", TORCH_BOX(&use_torch_threads));
}

}  // namespace baton::bindings
