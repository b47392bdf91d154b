"""The CUDA kernels behind the signatures of ``baton_kernels``, executed from nvcc's own PTX.

The host code runs in the emulator, which records its launches; the machine of machine.py then
executes them on the same memory, after the emulator's results have been taken away.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import torch

from emulation import build
from emulation.artifacts import ROOT
from emulation.cuda.ops import EmulatedOps
from emulation.ptx.machine import Machine, compile_ptx
from emulation.ptx.warpgroup import WarpgroupMachine
from emulation.static.kernels import (
    PTX_ARCHITECTURES,
    SOURCES,
    WARPGROUP,
    compiled,
    first_architectures,
)


@functools.cache
def kernel_names(module: str) -> dict[int, str]:
    """The kernels of a library by their place in it, named as `copy_kernelILi16E`."""
    lines = subprocess.run(["nm", module], capture_output=True, text=True, check=True).stdout
    names = {}
    for line in lines.splitlines():
        if found := re.match(r"([0-9a-f]+) \w .*\d([a-z]\w*_kernelI\w*)Ev\w*$", line):
            names[int(found[1], 16)] = found[2]
    return names


def is_of_warpgroups(kernel: str) -> bool:
    """Whether it is one for sm_90a only."""
    return "warpgroup_kernel" in kernel


def source_of(op: str, kernel: str, sources: Path = ROOT / "csrc" / "cuda") -> Path:
    """The file that has a kernel."""
    # The tensor core kernels of a dtype have files to themselves.
    files = {"13__nv_bfloat16": "bfloat16", "6__half": "half"}
    of_dtype = re.search(r"(paged_)?(decode|prefill)_kernelI(13__nv_bfloat16|6__half)", kernel)
    name = files[of_dtype[3]] + ("_paged" if of_dtype[1] else "") if of_dtype else op
    folder = sources / op if (sources / op).is_dir() else sources
    return folder / ("warpgroup.cu" if is_of_warpgroups(kernel) else f"{name}.cu")


@functools.cache
def ptx_of(op: str, kernel: str, architecture: int, sources: Path) -> str:
    """PTX of the file that has a kernel."""
    path = source_of(op, kernel, sources)
    if path == WARPGROUP:
        return compiled(path, (90,)).ptx[90]
    first = first_architectures(path) if path in SOURCES else ()
    if architecture in first and architecture in PTX_ARCHITECTURES:
        return compiled(path, first).ptx[architecture]
    return compile_ptx(path, architecture, sources.parent)


class PtxOps(EmulatedOps):
    """A backend of the ``ops`` fixture; ``machines`` has one of every launch so far, by name."""

    def __init__(
        self, architecture: int = 80, sources: Path = ROOT / "csrc" / "cuda",
        prefill: str = "mma", **options,
    ) -> None:  # fmt: skip
        # The emulated host would choose for the device that it knows.
        super().__init__(build.FAST, prefill=prefill, **options)
        self.architecture, self.sources = architecture, sources
        self.machines: list[tuple[str, Machine]] = []
        # The tensors that the last call wrote, and the emulator's results of the same call.
        self.written: dict[str, torch.Tensor] = {}
        self.emulated: dict[str, torch.Tensor] = {}

    def machine(self, op: str, kernel: str) -> Machine:
        machine = WarpgroupMachine if is_of_warpgroups(kernel) else Machine
        return machine(ptx_of(op, kernel, self.architecture, self.sources), kernel)

    def run(self, op: str, inputs: dict, outputs: dict, **fields) -> None:
        self.written = written = {name: x for name, x in outputs.items() if x is not None}
        before = {name: x.clone() for name, x in written.items()}
        launches = self.module.record(
            lambda: super(PtxOps, self).run(op, inputs, outputs, **fields)
        )
        self.emulated = {name: x.clone() for name, x in written.items()}
        for name, x in written.items():
            x.copy_(before[name])
        tensors = [x for x in (inputs | outputs).values() if x is not None and x.numel()]
        for offset, grid, block, shared_bytes, arguments, behind in launches:
            kernel = kernel_names(self.module.__file__)[offset]
            machine = self.machine(op, kernel)
            # Below sm_90 every launch waits for the one before.
            if behind and self.architecture >= 90:
                held_back = [(x, before[name]) for name, x in written.items()]
                machine.launch(grid, block, arguments, tensors, shared_bytes, held_back)
            else:
                before = {name: x.clone() for name, x in written.items()}
                machine.launch(grid, block, arguments, tensors, shared_bytes)
            self.machines.append((kernel, machine))
