"""Several linear modules with the same input as one weight, without copies of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class MergedProjection:
    """Several linear modules with the same input as one weight and one bias; the modules'
    parameters are views of them."""

    def __init__(self, linears: Sequence[nn.Linear]) -> None:
        self._weights: list[torch.Tensor] = [linear.weight for linear in linears]
        self._biases: list[torch.Tensor] = [
            linear.bias for linear in linears if linear.bias is not None
        ]
        self.weight = _merge(self._weights)
        self.bias = _merge(self._biases) if self._biases else None

    def is_shared(self) -> bool:
        """Whether the first parameter still is a view of the merged weight."""
        return self._weights[0].data_ptr() == self.weight.data_ptr()

    def restore(self) -> None:
        """Give each parameter separate memory."""
        for parameter in (*self._weights, *self._biases):
            parameter.data = parameter.data.clone()


def _merge(parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    merged = _neighbors([parameter.data for parameter in parameters])
    if merged is None:
        merged = torch.cat([parameter.data for parameter in parameters])
    parts = merged.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return merged


def _neighbors(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The parts as one tensor if they are adjacent in memory, else None. They are adjacent in a
    model that was saved while patched, which then needs no copy."""
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        memory = part.untyped_storage().data_ptr()
        same = memory == first.untyped_storage().data_ptr() and part.data_ptr() == end
        if not (same and part.is_contiguous()):
            return None
        end += part.nbytes
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
