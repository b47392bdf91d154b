"""Linear modules with packed weights, stored in the order in which a CPU reads them.

Packed weights are as large as the weights, and parameters cannot be views of them. So unless they
are kept, the modules' parameters give up their memory until `restore`, and `PackedParameter`s stand
in for them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from baton_kernels import PanelMemory, pack_linear, panel_bytes

from .packed_parameter import PackedParameter


class PackedProjection:
    """Several linear modules with the same input as one packed weight and one bias.

    Args:
        linears: of one dtype, on the CPU. Written: unless parameters are kept, stand-ins replace
            their weights, which give up their memory.
        memory: where the panels are stored.
        dtype: of the panels; see `pack_linear`. The original of rounded values is lost.
        keep_parameters: whether the modules keep their weights as well.
        also: other modules that have the first linear module's parameter.

    Attributes:
        weight: the `PackedWeight`.
        bias: the modules' biases one after the other, or None.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        memory: PanelMemory,
        *,
        dtype: torch.dtype | None = None,
        keep_parameters: bool,
        also: Sequence[nn.Module] = (),
    ) -> None:
        self._memory = memory
        self._dtype = linears[0].weight.dtype
        self._stand_ins: list[tuple[list[nn.Module], nn.Parameter, PackedParameter]] = []
        parameters: list[Any] = [linear.weight for linear in linears]
        biases = [linear.bias.data for linear in linears if linear.bias is not None]
        self.bias = _joined(biases) if biases else None
        rows = _joined([parameter.data for parameter in parameters])
        ends = torch.tensor([len(parameter) for parameter in parameters]).cumsum(0).tolist()
        if keep_parameters:
            self.weight = pack_linear(rows, dtype=dtype, memory=memory)
            return
        shells = []
        is_exact = dtype in (None, self._dtype)
        for parameter, end in zip(parameters, ends, strict=True):
            begin = end - len(parameter)
            unpack = functools.partial(self._unpack, begin, end) if is_exact else None
            take_rows = functools.partial(self._rows, begin) if is_exact else None
            shells.append(PackedParameter.of(parameter, unpack, take_rows))
        # Frees the weights' memory before allocating that of the panels.
        for parameter in parameters:
            parameter.data = parameter.data.new_empty(0)
        self.weight = pack_linear(rows, dtype=dtype, memory=memory)
        for linear, parameter, shell in zip(linears, parameters, shells, strict=True):
            modules: list[nn.Module] = [linear]
            if linear is linears[0]:
                modules += also
            for module in modules:
                module.weight = shell
            self._stand_ins.append((modules, parameter, shell))

    def is_shared(self) -> bool:
        """Whether the stand-ins are still in place and have not been given values."""
        for modules, _, shell in self._stand_ins:
            same = shell.is_packed and shell.dtype == self._dtype
            if not same or modules[0].weight is not shell:
                return False
        return True

    def restore(self) -> None:
        """Give each module its parameter back, in separate memory, and the panels' memory to the
        system. Stand-ins for rounded values stay, and raise an error when they are read."""
        if not self._stand_ins:
            return
        if self.weight.scales is not None:
            self._memory.release(self.weight.panels)
            for modules, parameter, shell in self._stand_ins:
                # Values that somebody gave it belong to the parameter, as below.
                if not shell.is_packed:
                    parameter.data = shell.data
                    for module in modules:
                        if module.weight is shell:
                            module.weight = parameter
            self._stand_ins.clear()
            return
        rows = self.weight.unpack()
        self._memory.release(self.weight.panels)
        begin = 0
        for modules, parameter, shell in self._stand_ins:
            end = begin + len(shell)
            # Values that somebody gave the stand-in become the parameter's.
            parameter.data = rows[begin:end].clone() if shell.is_packed else shell.data
            begin = end
            for module in modules:
                if module.weight is shell:
                    module.weight = parameter
        self._stand_ins.clear()

    def _unpack(self, begin: int, end: int) -> torch.Tensor:
        return self.weight.rows(torch.arange(begin, end, dtype=torch.int32, device="cpu"))

    def _rows(self, begin: int, indices: torch.Tensor) -> torch.Tensor:
        return self.weight.rows(indices + begin)


def memory_for(
    groups: Iterable[Sequence[nn.Linear]], dtype: torch.dtype | None = None
) -> PanelMemory:
    """Memory for the panels of all groups of linear modules that become one projection each.

    Args:
        groups: the linear modules.
        dtype: of the panels; see `pack_linear`.
    """
    total = 0
    for linears in groups:
        rows, columns = sum(linear.out_features for linear in linears), linears[0].in_features
        like = torch.empty(1, dtype=linears[0].weight.dtype, device="cpu").expand(rows, columns)
        total += panel_bytes(like, dtype=dtype)
    return PanelMemory(total)


def return_free_memory() -> None:
    """Lets the C library return freed blocks to the system. Otherwise it would keep the memory of a
    layer's former weights in addition to its panels."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
