import math

import pytest
import torch

import baton_kernels
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_accurate,
    assert_same_bits,
    cpu_threads,
    embed,
    nan_in_empty,
    storage,
    twin,
)


def problem(*shape, dtype=torch.float32, margin=8, seed=0):
    """``shape`` is the result's: x has twice its last dimension."""
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn((*shape[:-1], 2 * shape[-1]), generator=generator)
    return embed(x.to(dtype), [1] * (len(shape) - 1) + [margin])


def check(ops, x):
    before = twin(x)
    with nan_in_empty():
        actual = ops.silu_and_mul(x)
    assert_accurate(actual, "silu_and_mul", before)
    assert_same_bits(storage(x), storage(before), "x")
    assert actual.is_contiguous()
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, size):
    check(ops, problem(3, size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_rows(ops, dtype, rows):
    check(ops, problem(rows, 24, dtype=dtype, margin=3))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1024, 1000])
def test_large_results(ops, dtype, size):
    """Results over 8 MiB, which the CPU writes past its caches, have the bits of a few rows."""
    rows = 2**23 // (1000 * dtype.itemsize) + 1
    x = problem(rows, size, dtype=dtype)
    with nan_in_empty():
        whole = ops.silu_and_mul(x)
    assert not whole.isnan().any()
    assert_same_bits(whole[-5:], ops.silu_and_mul(x[-5:]))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 64), (2, 1, 3, 40)])
def test_dimensions(ops, shape):
    assert check(ops, problem(*shape)).shape == shape


def test_contiguous_tensor(ops):
    check(ops, problem(9, 64).contiguous())


# 2. Edges.


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_nothing_to_do(ops, shape):
    assert check(ops, problem(*shape)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_far_from_zero(ops, dtype):
    """The exponential neither overflows nor gives NaN for large arguments."""
    a = torch.tensor([-1e30, -3e4, -200.0, -90.0, -88.0, -20.0, 20.0, 88.0, 90.0, 200.0, 3e4])
    a = a.to(dtype)
    a = a[a.isfinite()]
    y = ops.silu_and_mul(torch.cat((a, torch.ones_like(a)))[None])
    silu = a.double() / (1 + torch.exp(-a.double()))
    # Where exp() overflows the result is 0, and float16 has no exact neighbors of the smallest.
    least = max(1e-30, torch.finfo(dtype).tiny * torch.finfo(dtype).eps)
    torch.testing.assert_close(y[0], silu.to(dtype), atol=least, rtol=torch.finfo(dtype).eps * 4)


# 3. Poison and batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(ops, dtype):
    x = problem(5, 63, dtype=dtype)
    expected = ops.silu_and_mul(x)
    x[2] = torch.nan
    y = ops.silu_and_mul(x)
    for i in (0, 1, 3, 4):
        assert_same_bits(y[i], expected[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 1536])
def test_batch_invariance(ops, dtype, size):
    x = problem(50, size, dtype=dtype)
    expected = ops.silu_and_mul(x)
    for threads, rows in [(1, [7]), (2, [49]), (2, list(range(49, -1, -1)))]:
        with cpu_threads(threads):
            assert_same_bits(ops.silu_and_mul(x[rows]), expected[rows])


# 4. Bad arguments.

BAD = {
    "odd size": Refusal("x", ValueError, x=lambda x: x[:, :7]),
    "no dimensions": Refusal("x", ValueError, x=torch.tensor(1.0)),
    "double": Refusal("x", TypeError, x=torch.Tensor.double),
    "int": Refusal("x", TypeError, x=torch.Tensor.int),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("silu_and_mul", {"x": problem(3, 4)}, route)


# 5. torch.compile.


def test_opcheck():
    torch.library.opcheck(torch.ops.baton_kernels.silu_and_mul.default, (problem(3, 64),))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        silu_and_mul = staticmethod(
            torch.compile(baton_kernels.silu_and_mul, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, 64))
    check(Compiled, problem(5, 64))


# 6. By hand.


def test_by_hand(ops):
    # sigmoid(ln 3) = 3 / 4, sigmoid(-ln 3) = 1 / 4.
    x = torch.tensor([[0.0, math.log(3.0), -math.log(3.0), 5.0, 4.0, 8.0]])
    expected = torch.tensor([[0.0, 3 * math.log(3.0), -2 * math.log(3.0)]])
    torch.testing.assert_close(ops.silu_and_mul(x), expected)
