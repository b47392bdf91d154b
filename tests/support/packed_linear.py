"""Shared by the tests of `linear` with packed weights, for every dtype of panels."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from baton_kernels import pack_linear
from baton_kernels.testing import assert_same_bits, before_a_hole, cpu_threads, embed


def problem(rows, size_in, size_out, *, bias=False, dtype=torch.float32, margin=8, seed=0):
    """Arguments of `linear`, slices of larger tensors."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        x = torch.randn(shape, generator=generator).to(dtype)
        return embed(x, [1] * (len(shape) - 1) + [margin])

    arguments = {"x": numbers(rows, size_in), "weight": numbers(size_out, size_in)}
    return arguments | {"bias": numbers(size_out)} if bias else arguments


def project(ops, arguments, dtype=None):
    """The product with a weight that is packed by the same instruction set."""
    packed = pack_linear(arguments["weight"], dtype=dtype)
    return ops.linear(**arguments | {"weight": packed})


def check_poison_in_a_row(ops, arguments, dtype, poison):
    """`poison(x)` spoils row 2."""
    expected = project(ops, arguments, dtype)
    poison(arguments["x"])
    y = project(ops, arguments, dtype)
    assert y[2].isnan().all()
    others = [i for i in range(len(y)) if i != 2]
    assert_same_bits(y[others], expected[others])


def check_poison_in_an_output(ops, arguments, dtype, poison):
    """`poison(row)` spoils the row of one output; neighbors in its panel and the next are right."""
    expected = project(ops, arguments, dtype)
    for output in (0, 47, 48, 129):
        spoiled = arguments | {"weight": arguments["weight"].clone()}
        poison(spoiled["weight"][output])
        y = project(ops, spoiled, dtype)
        assert y[:, output].isnan().all()
        others = [i for i in range(130) if i != output]
        assert_same_bits(y[:, others], expected[:, others])


def check_before_a_hole(ops, arguments, dtype):
    """Nothing behind the arguments is loaded. Panels, too, end where memory ends."""
    packed = pack_linear(before_a_hole(arguments["weight"]), dtype=dtype)
    tensors = {"panels": before_a_hole(packed.panels)}
    if packed.scales is not None:
        tensors["scales"] = before_a_hole(packed.scales)
    packed = packed._replace(**tensors)
    x, bias = before_a_hole(arguments["x"]), before_a_hole(arguments["bias"])
    assert_same_bits(ops.linear(x, packed, bias), project(ops, arguments, dtype))
    assert_same_bits(packed.unpack(), pack_linear(arguments["weight"], dtype=dtype).unpack())


def check_any_number_of_rows(ops, arguments, dtype):
    """Rows have the same bits one by one, 130 together, and the first or last few together."""
    packed = pack_linear(arguments["weight"], dtype=dtype)
    x, bias = arguments["x"], arguments["bias"]
    with cpu_threads(1):
        expected = ops.linear(x, packed, bias)
        alone = torch.cat([ops.linear(x[i : i + 1], packed, bias) for i in range(130)])
    assert_same_bits(alone, expected)
    for rows in [*range(2, 35), 48, 64, 95, 96, 97, 129]:
        with cpu_threads(1 + rows % 2):
            assert_same_bits(ops.linear(x[:rows], packed, bias), expected[:rows], f"{rows} rows")
            assert_same_bits(ops.linear(x[-rows:], packed, bias), expected[-rows:], f"{rows} rows")


def check_many_threads(ops, arguments, dtype):
    """With more threads than panels, so that several share one."""
    packed = pack_linear(arguments["weight"], dtype=dtype)
    with cpu_threads(1):
        expected = ops.linear(arguments["x"], packed)
    for threads in (3, 8):
        with cpu_threads(threads):
            assert_same_bits(ops.linear(arguments["x"], packed), expected, f"{threads} threads")


def check_refusal(case, ops, route):
    """A row of a table of bad arguments: op, argument's name in the message, error, changes.

    Args:
        case: the row.
        ops: by name an op's Python function, its overload, and a function for valid arguments.
        route: "python", "torch.ops" or "fake".
    """
    op, argument, error, changes = case
    function, overload, make = ops[op]
    arguments = make() | changes
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    expected = rf"{op}: {argument}(\[\d+\])? must be .+, got .+"
    if route == "fake":
        with FakeTensorMode() as mode, pytest.raises(error, match=expected):
            function(
                **{
                    k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v
                    for k, v in arguments.items()
                }
            )
    elif route == "torch.ops":
        with pytest.raises(ValueError, match=expected):
            getattr(getattr(torch.ops.baton_kernels, op), overload)(**arguments)
    else:
        with pytest.raises(error, match=expected):
            function(**arguments)
    for key, bits in before.items():
        assert_same_bits(arguments[key], bits, key)
