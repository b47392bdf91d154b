"""The backends of the ``ops`` fixture that run CUDA kernels without a GPU."""

from emulation import build
from emulation.cuda.ops import BACKWARD, SHUFFLED, EmulatedOps

# Two schedules that disagree in everything they can; the second one under the judge's eyes.
EMULATED = {
    "cuda-emulated": EmulatedOps(build.FAST),
    "cuda-judged": EmulatedOps(
        build.JUDGED,
        threads=SHUFFLED, warps=BACKWARD, blocks=SHUFFLED, late_copies=True,
    ),
}  # fmt: skip
