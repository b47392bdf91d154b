// Runs one planted defect: `main <name> <0 or 1: wrong>`. Prints the reports; the exit status is 1
// when there are any, or when the result is wrong.
#include <cstdio>
#include <cstring>

#include "emulation/cuda/defects/block_race.cu"
#include "emulation/cuda/defects/block_race_across_barrier.cu"
#include "emulation/cuda/defects/defect.h"
#include "emulation/cuda/defects/divergent_barrier.cu"
#include "emulation/cuda/defects/divergent_shuffle.cu"
#include "emulation/cuda/defects/dynamic_shared_out_of_bounds.cu"
#include "emulation/cuda/defects/ends_before_grid.cu"
#include "emulation/cuda/defects/global_out_of_bounds.cu"
#include "emulation/cuda/defects/misaligned_dereference.cu"
#include "emulation/cuda/defects/misaligned_vector.cu"
#include "emulation/cuda/defects/missing_barrier.cu"
#include "emulation/cuda/defects/missing_fence.cu"
#include "emulation/cuda/defects/missing_grid_wait.cu"
#include "emulation/cuda/defects/missing_sync_before_ldmatrix.cu"
#include "emulation/cuda/defects/missing_trailing_barrier.cu"
#include "emulation/cuda/defects/missing_wait.cu"
#include "emulation/cuda/defects/missing_warp_sync.cu"
#include "emulation/cuda/defects/static_shared_out_of_bounds.cu"
#include "emulation/cuda/defects/unwritten_shared.cu"

int main(int argc, char** argv) {
  if (argc != 3 || !defects::all().count(argv[1])) return 2;
  emulation::options().late_copies = true;
  const bool right = defects::all()[argv[1]](std::strcmp(argv[2], "1") == 0);
  const auto reports = emulation::take_reports();
  for (const auto& report : reports) std::printf("%s\n", report.c_str());
  if (!right) std::printf("wrong result\n");
  return reports.empty() && right ? 0 : 1;
}
