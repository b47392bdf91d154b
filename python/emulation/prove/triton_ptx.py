"""Triton's own PTX of ragged_attention on the machine on terms: what a GPU would be given.

Launches are recorded as the op makes them, on tensors whose elements are leaves; each is compiled
with the types, constants and alignments that Triton would see, and executed.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton_kernels.triton import common, ragged_attention
from emulation.ptx.symbolic import SymbolicMachine
from emulation.ptx.symbolic_ops import SymbolicOps
from emulation.ptx.terms import Terms

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32",
}  # fmt: skip
PACKED = {"fp32": np.float32, "i32": np.int32, "i64": np.int64}


def signature_of(launch: common.Launch) -> tuple[dict[str, str], dict[str, Any]]:
    """Kinds of a launch's arguments, as Triton specializes them, and their values, by name."""
    kernel = launch.kernel
    given = dict(launch.constants)
    given.update(zip([n for n in kernel.arg_names if n not in given], launch.args, strict=True))
    kinds = {}
    for parameter in kernel.params:
        value, kind = given[parameter.name], "constexpr"
        if isinstance(value, torch.Tensor):
            kind = "*" + TYPES[value.dtype]
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind = "fp32"
        elif value is not None and not parameter.is_constexpr and (
            value != 1 or parameter.do_not_specialize
        ):  # fmt: skip
            kind = "i32" if value < 2**31 else "i64"
        kinds[parameter.name] = kind
    return kinds, given


class TritonOps(SymbolicOps):
    """Triton's kernels in place of the CUDA ones."""

    def __init__(self, terms: Terms, architecture: int) -> None:
        super().__init__(terms, architecture)
        self.compiled: dict[tuple, tuple[SymbolicMachine, Any]] = {}

    def entered(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def ragged_attention(self, *args, **options):
        with common.recording() as launches:
            result = ragged_attention(*args, **options)
        for launch in launches:
            self.execute(launch)
        return result

    def execute(self, launch: common.Launch) -> None:
        kinds, given = signature_of(launch)
        machine, metadata = self.machine_of(launch, kinds, given)
        machine.shadow = self.shadow
        tensors = [x for x in given.values() if isinstance(x, torch.Tensor) and x.numel()]
        for x in tensors:
            if x.dtype.is_floating_point and x.untyped_storage().data_ptr() not in (
                self.shadow.storages
            ):  # fmt: skip
                nobody = self.table.leaf(("a result before it is written",), "unwritten")
                self.shadow.of(x)[:] = nobody
        arguments = []
        for name, kind in kinds.items():
            if kind[0] == "*":
                arguments.append(np.array(given[name].data_ptr(), np.uint64).tobytes())
            elif kind != "constexpr":
                arguments.append(np.array(given[name], PACKED[kind]).tobytes())
        # Scratch memory, of which these kernels need none.
        arguments += [bytes(8)] * 2
        block = (32 * metadata.num_warps, 1, 1)
        machine.launch((launch.programs, 1, 1), block, arguments, tensors, metadata.shared)

    def machine_of(self, launch: common.Launch, kinds, given) -> tuple[SymbolicMachine, Any]:
        """A launch's kernel, compiled for what is known of its arguments."""
        constants, attributes = {}, {}
        for i, parameter in enumerate(launch.kernel.params):
            value, kind = given[parameter.name], kinds[parameter.name]
            if kind == "constexpr":
                constants[(i,)] = value
            elif kind[0] == "*" or (
                kind[0] == "i" and not parameter.do_not_specialize and value % 16 == 0
            ):
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = (launch.kernel.__name__, *kinds.items(), *constants.items(), *attributes)
        if key not in self.compiled:
            source = ASTSource(launch.kernel, kinds, constants, attributes)
            target = GPUTarget("cuda", self.architecture, 32)
            made = triton.compile(source, target=target, options=launch.options)
            name = launch.kernel.__name__
            machine = SymbolicMachine(made.asm["ptx"], name, self.table)
            self.compiled[key] = machine, made.metadata
            self.kernels[f"triton {name}, {len(self.compiled)}"] = machine
        return self.compiled[key]
