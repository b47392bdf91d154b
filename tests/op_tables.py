"""The tables of bad arguments of the ops' own tests, for tests of other ways to call an op."""

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def table(op):
    """The bad arguments of an op's tests, and a function that gives valid ones to spoil."""
    spec = importlib.util.spec_from_file_location(f"table_{op}", FOLDER / f"test_{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    special = {
        "linear": lambda: module.problem(3, 8, 4, bias=True),
        "merge_attention": lambda: module.problem(3),
        "rms_norm": lambda: module.problem(3, 8, residual=True),
        "silu_and_mul": lambda: {"x": module.problem(3, 4)},
    }
    return module.BAD, special.get(op) or module.arguments_to_spoil
