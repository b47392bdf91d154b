"""The ops on terms: the emulator's host code launches, the symbolic machine executes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from emulation.artifacts import ROOT
from emulation.ptx.ops import PtxOps, ptx_of
from emulation.ptx.symbolic import SymbolicMachine
from emulation.ptx.symbolic_memory import Shadow
from emulation.ptx.terms import Terms


class SymbolicOps(PtxOps):
    """One set of kernels; terms of all calls have one table, so that equal ones are one number."""

    def __init__(
        self, terms: Terms, architecture: int = 80, sources: Path = ROOT / "csrc" / "cuda",
        text_of: Callable[[str, str, int, Path], str] = ptx_of,
    ) -> None:  # fmt: skip
        """``text_of(op, kernel, architecture, sources)`` is the PTX that has a kernel."""
        super().__init__(architecture, sources)
        self.text_of = text_of
        self.table = terms
        self.shadow = Shadow(terms)
        self.kernels: dict[str, SymbolicMachine] = {}

    def machine(self, op: str, kernel: str) -> SymbolicMachine:
        if kernel not in self.kernels:
            text = self.text_of(op, kernel, self.architecture, self.sources)
            self.kernels[kernel] = SymbolicMachine(text, kernel, self.table)
        machine = self.kernels[kernel]
        machine.shadow = self.shadow
        return machine

    def forget(self) -> None:
        """Another call, other tensors."""
        self.shadow = Shadow(self.table)

    def run(self, op: str, inputs: dict, outputs: dict, **fields) -> None:
        for name, x in outputs.items():
            if x is not None and x.numel() and x.untyped_storage().data_ptr() not in (
                self.shadow.storages
            ):  # fmt: skip
                nobody = self.table.leaf((f"{name} before it is written",), "unwritten")
                self.shadow.of(x)[:] = nobody
        super().run(op, inputs, outputs, **fields)

    def terms_of(self, x: torch.Tensor) -> np.ndarray:
        """A tensor's terms by element: one per two bytes of it."""
        halves = self.shadow.of(x)
        size = x.element_size() // 2
        numbers = torch.arange(len(halves) // size)
        first = numbers.as_strided(x.shape, x.stride(), x.storage_offset()).numpy()
        return halves[first[..., None] * size + np.arange(size)]
