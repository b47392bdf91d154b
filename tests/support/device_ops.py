"""The ops on a device, behind CPU tensors, so that one test function tests CPU and GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch

import baton_kernels
from baton_kernels.testing import storage


class DeviceOps:
    """One backend of the ``ops`` fixture: arguments go to the device, results come back.

    All memory behind an argument is copied, including padding and margins, and keeps its strides
    and alignment; afterwards it is copied back, so that a test sees every write, even a wrong one.
    Arguments that share memory share it on the device.

    Args:
        device: where the ops run.
        namespace: has the ops: `baton_kernels`, or `baton_kernels.triton` for the Triton kernels
            of ops that also have others on the device.
    """

    def __init__(self, device: str, namespace: Any = baton_kernels) -> None:
        self.device = device
        self.namespace = namespace

    def __getattr__(self, op: str) -> Any:
        if op not in baton_kernels.ops.__all__:
            raise AttributeError(op)
        return functools.partial(self._run, op)

    def _run(self, op: str, *args: Any, **kwargs: Any) -> Any:
        memory: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

        def send(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(send, x))
            if not isinstance(x, torch.Tensor):
                return x
            whole = storage(x)
            # Empty memory has the same address for every dtype.
            key = whole.data_ptr(), whole.dtype
            if key not in memory:
                memory[key] = whole, whole.to(self.device, copy=True)
            there = memory[key][1]
            return there.as_strided(x.shape, x.stride(), x.storage_offset())

        function = getattr(self.namespace, op)
        result = function(*map(send, args), **{name: send(x) for name, x in kwargs.items()})
        for here, there in memory.values():
            here.copy_(there)
        if isinstance(result, tuple):
            return tuple(x.cpu() for x in result)
        return None if result is None else result.cpu()
