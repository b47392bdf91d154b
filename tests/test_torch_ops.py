"""The protocols of baton_kernels.torch_ops are the schemas that torch has."""

import inspect
import typing

import pytest
import torch

import baton_kernels
from baton_kernels import torch_ops

TYPES = {
    "Tensor": torch.Tensor,
    "Optional[Tensor]": torch.Tensor | None,
    "int": int,
    "Optional[int]": int | None,
    "SymInt": int,
    "Optional[SymInt]": int | None,
    "float": float,
    "Optional[float]": float | None,
    "bool": bool,
    "ScalarType": torch.dtype,
    "Optional[ScalarType]": torch.dtype | None,
}
OPS = typing.get_type_hints(torch_ops.TorchOps)


def expected_signature(schema):
    """Name, whether keyword-only, type and default of every argument; and the results."""
    arguments = []
    for argument in schema.arguments:
        default = inspect.Parameter.empty
        if argument.has_default_value():
            default = argument.default_value
            if str(argument.type) == "int" and str(argument.real_type) == "ScalarType":
                default = torch.bool
        kind = TYPES[str(argument.real_type)]
        arguments.append((argument.name, argument.kwarg_only, kind, default))
    results = tuple(TYPES[str(result.type)] for result in schema.returns)
    if len(results) > 1:
        return arguments, tuple[results]
    return arguments, results[0] if results else type(None)


def signature(protocol):
    hints = typing.get_type_hints(protocol.__call__)
    parameters = list(inspect.signature(protocol.__call__).parameters.values())[1:]
    return [
        (p.name, p.kind is p.KEYWORD_ONLY, hints[p.name], p.default) for p in parameters
    ], hints["return"]


def test_every_op_is_there():
    packed = {"linear_packed", "pack_linear", "unpack_linear", "quantize_linear"}
    assert set(OPS) == set(baton_kernels.ops.__all__) | packed


@pytest.mark.parametrize("op", OPS)
def test_overloads_are_the_schemas(op):
    packet = getattr(torch.ops.baton_kernels, op)
    overloads = typing.get_type_hints(OPS[op])
    assert set(overloads) == set(packet.overloads())
    for name, protocol in overloads.items():
        assert signature(protocol) == expected_signature(getattr(packet, name)._schema), name
    # A call without an overload.
    assert signature(OPS[op]) == signature(overloads["default"])
