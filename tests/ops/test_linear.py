import pytest
import torch

import baton_kernels
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_accurate,
    assert_same_bits,
    before_a_hole,
    cpu_threads,
    embed,
    nan_in_empty,
    storage,
    twin,
)


def problem(tokens, size_in, size_out, *, bias=False, dtype=torch.float32, margin=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        x = torch.randn(shape, generator=generator).to(dtype)
        return embed(x, [1] * (len(shape) - 1) + [margin])

    arguments = {"x": numbers(tokens, size_in), "weight": numbers(size_out, size_in)}
    return arguments | {"bias": numbers(size_out)} if bias else arguments


def check(ops, arguments):
    before = {name: twin(x) for name, x in arguments.items()}
    with nan_in_empty():
        actual = ops.linear(**arguments)
    # Without margins: on a CPU with AMX, torch's own kernel reads NaN from between two rows.
    assert_accurate(actual, "linear", *(x.contiguous() for x in before.values()))
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(before[name]), name)
    assert actual.is_contiguous()
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [(1, 63, 128), (63, 128, 1), (128, 1000, 63), (1000, 63, 128), (2, 1, 1000), (1, 1000, 40)],
    ids=str,
)
def test_matches_reference(ops, dtype, bias, sizes):
    check(ops, problem(*sizes, bias=bias, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 4, 97, 193])
def test_sizes_of_a_model(ops, dtype, tokens):
    check(ops, problem(tokens, 576, 192, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums(ops, dtype):
    """The error of a sum grows with its length unless it is kept in parts, as plain torch does."""
    check(ops, problem(16, 4096, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_aligned_to_nothing(ops, dtype):
    check(ops, problem(5, 67, 35, bias=True, dtype=dtype, margin=3))


def test_contiguous_tensors(ops):
    arguments = problem(9, 64, 48, bias=True)
    check(ops, {name: x.contiguous() for name, x in arguments.items()})


# 2. Edges.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", [(0, 64, 8), (3, 64, 0), (3, 0, 8)], ids=str)
def test_nothing_to_do(ops, bias, sizes):
    assert check(ops, problem(*sizes, bias=bias)).shape == (sizes[0], sizes[2])


def test_single_numbers(ops):
    y = ops.linear(torch.tensor([[3.0]]), torch.tensor([[-2.0]]), torch.tensor([10.0]))
    assert y.tolist() == [[4.0]]


# 3. Poison and batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(ops, dtype):
    arguments = problem(7, 67, 35, dtype=dtype)
    expected = ops.linear(**arguments)
    arguments["x"][2] = torch.nan
    y = ops.linear(**arguments)
    for i in (0, 1, 3, 4, 5, 6):
        assert_same_bits(y[i], expected[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 67, 35), (5, 64, 3), (17, 96, 32), (100, 40, 50)], ids=str)
def test_nothing_is_loaded_from_behind_the_arguments(ops, sizes, dtype):
    arguments = problem(*sizes, bias=True, dtype=dtype)
    assert_same_bits(
        ops.linear(**{name: before_a_hole(x) for name, x in arguments.items()}),
        ops.linear(**arguments),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(576, 192), (1000, 35), (33, 70)], ids=str)
def test_batch_invariance(ops, dtype, sizes):
    arguments = problem(300, *sizes, bias=True, dtype=dtype)
    with cpu_threads(1):
        expected = ops.linear(**arguments)
    batches = [[i] for i in (0, 95, 96, 299)] + [[7, 8], list(range(3, 100)), list(range(17))]
    batches += [list(range(299, -1, -1))]
    for i, rows in enumerate(batches):
        with cpu_threads(1 + i % 2):
            actual = ops.linear(**arguments | {"x": arguments["x"][rows]})
        assert_same_bits(actual, expected[rows], f"rows {rows[0]} and {len(rows) - 1} others")


# 4. Bad arguments.

BAD = {
    "x of one dimension": Refusal("x", ValueError, x=lambda x: x[0]),
    "x of three dimensions": Refusal("x", ValueError, x=lambda x: x[None]),
    "x of other size": Refusal("x|weight", ValueError, x=lambda x: x[:, :7]),
    "weight of one dimension": Refusal("weight", ValueError, weight=lambda x: x[0]),
    "weight of other dtype": Refusal("weight", TypeError, weight=torch.Tensor.half),
    "bias of other size": Refusal("bias", ValueError, bias=lambda x: x[:3]),
    "bias of two dimensions": Refusal("bias", ValueError, bias=lambda x: x[None]),
    "bias of other dtype": Refusal("bias", TypeError, bias=torch.Tensor.half),
    "double": Refusal(
        "x", TypeError, **dict.fromkeys(("x", "weight", "bias"), torch.Tensor.double)
    ),
    "int": Refusal("x", TypeError, **dict.fromkeys(("x", "weight", "bias"), torch.Tensor.int)),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("linear", problem(3, 8, 4, bias=True), route)


# 5. torch.compile.


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    args = tuple(problem(3, 64, 32, bias=bias).values())
    torch.library.opcheck(torch.ops.baton_kernels.linear.default, args)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("bias", [False, True])
def test_compile(bias):
    class Compiled:
        linear = staticmethod(
            torch.compile(baton_kernels.linear, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, 64, 32, bias=bias))
    check(Compiled, problem(5, 64, 32, bias=bias))


# 6. By hand.


def test_by_hand(ops):
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
    weight = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, -4.0]])
    assert ops.linear(x, weight).tolist() == [[6.0, -10.0], [-0.5, -2.0]]
    bias = torch.tensor([10.0, 20.0])
    assert ops.linear(x, weight, bias).tolist() == [[16.0, 10.0], [9.5, 18.0]]
