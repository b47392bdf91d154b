#include <cstdio>
#include <cstdlib>

#include "common/dtype.h"

namespace baton {

void dispatch_failed(const char* what, int64_t value) {
  std::fprintf(stderr, "no kernel for %s %lld\n", what, static_cast<long long>(value));
  std::abort();
}

}  // namespace baton
