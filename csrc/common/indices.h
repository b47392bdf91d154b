// The defaults of index arguments that a call leaves out: row i is in slot i, begins in column 0
// and has one token.
#pragma once

#include <cstdint>

namespace baton {

struct IndicesParams {
  int32_t* values;  // [2 * num_rows + 1]: 0, 1, ..., num_rows, and then num_rows zeros
  int64_t num_rows;
};

}  // namespace baton
