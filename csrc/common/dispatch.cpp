#include <cstdio>
#include <cstdlib>

#include "common/dtype.h"

namespace baton {

void dispatch_failed(const char* what, int64_t value) {
  // Unreachable: the bindings reject what no kernel handles. A wrong list of instantiations must
  // fail loudly instead of running nothing.
  std::fprintf(stderr, "baton_kernels: no kernel for %s %lld\n", what,
               static_cast<long long>(value));
  std::abort();
}

}  // namespace baton
