"""The ops' overloads and their tests' tables of bad arguments, for calling them in other ways."""

import importlib.util
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "ops"


def table(op):
    """The bad arguments of an op's tests, and a function that gives valid ones to spoil."""
    spec = importlib.util.spec_from_file_location(f"table_{op}", FOLDER / f"test_{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    special = {
        "likeliest": lambda: {"logits": module.problem(3, 8)},
        "linear": lambda: module.problem(3, 8, 4, bias=True),
        "merge_attention": lambda: module.problem(3),
        "rms_norm": lambda: module.problem(3, 8, residual=True),
        "silu_and_mul": lambda: {"x": module.problem(3, 4)},
    }
    return module.BAD, special.get(op) or module.arguments_to_spoil


def schemas(op):
    """An op's schemas by overload, without those that write into the caller's tensors."""
    packet = getattr(torch.ops.baton_kernels, op)
    names = [name for name in packet.overloads() if not name.endswith("out")]
    return {name: getattr(packet, name)._schema for name in names}


def overload(op, arguments):
    """The overload of an op that takes these arguments, each by name."""
    for name, schema in schemas(op).items():
        if arguments.keys() <= {argument.name for argument in schema.arguments}:
            return getattr(getattr(torch.ops.baton_kernels, op), name)
    raise AssertionError(f"{op} takes no {arguments.keys()}")
