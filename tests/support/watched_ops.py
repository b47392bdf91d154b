"""CUDA's ops on the emulator, with what the last call of attention launched."""

from __future__ import annotations

import torch

from baton_kernels.testing import int32
from emulation import build
from emulation.cuda.ops import EmulatedOps
from emulation.ptx.ops import kernel_names

# With this many query vectors over all KV heads, the host leaves rows of several tokens whole.
MANY = 128 * 64


class WatchedOps(EmulatedOps):
    """Records the launches and the partial results of the last call of ragged_attention."""

    def __init__(self, variant: build.Variant = build.FAST, **options) -> None:
        super().__init__(variant, **options)
        # Names of kernels, with their template's arguments as the compiler writes them, and grids.
        self.kernels: list[str] = []
        self.launches: list[tuple[str, tuple[int, int, int]]] = []
        self.workspace = torch.empty(0)

    def run(self, op, inputs, outputs, **fields):
        launches = self.module.record(
            lambda: super(WatchedOps, self).run(op, inputs, outputs, **fields)
        )
        if op == "ragged_attention":
            names = kernel_names(self.module.__file__)
            self.kernels = [names[offset] for offset, *_ in launches]
            self.launches = [
                (name.partition("_kernel")[0].removeprefix("ragged_attention_"), grid)
                for name, (_, grid, *_) in zip(self.kernels, launches, strict=True)
            ]
            self.workspace = outputs["workspace"]

    @property
    def launched(self) -> list[str]:
        """The kernels' names: decode, prefill, warpgroup, merge, ..."""
        return [name for name, _ in self.launches]

    def partial_results(self, head_dim: int) -> int:
        """How many were written: the workspace began as NaN, and there is one sum per statistic."""
        return int((~self.workspace.isnan()).sum()) // (head_dim + 2)


def with_idle_row(problem, num_heads: int):
    """The call with one more row, long enough that no row of several tokens is split; slot -1."""
    tokens = MANY // num_heads + 1
    query = torch.cat([problem.query, problem.query.new_zeros(tokens, *problem.query.shape[1:])])
    bounds = [*problem.cu_seqlens_q.tolist(), len(query)]
    shape = (problem.slots, -1), (problem.starts, 0), (problem.lengths, 1)
    more = [int32([*x.tolist(), of_idle]) for x, of_idle in shape]
    return query, problem.key_cache, problem.value_cache, int32(bounds), *more
