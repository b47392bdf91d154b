import pytest
import torch

import baton_kernels
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_same_bits,
    cpu_threads,
    embed,
    storage,
    twin,
)


def problem(*shape, dtype=torch.float32, margin=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return embed(torch.randn(shape, generator=generator).to(dtype), [1, margin])


def check(ops, logits):
    before = twin(logits)
    actual = ops.likeliest(logits)
    assert_same_bits(actual, baton_kernels.reference.likeliest(before), "tokens")
    assert actual.dtype == torch.int64
    assert_same_bits(storage(logits), storage(before), "logits")
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000, 5000])
def test_matches_reference(ops, dtype, size):
    check(ops, problem(3, size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 128])
def test_rows(ops, dtype, rows):
    check(ops, problem(rows, 24, dtype=dtype, margin=3))


@pytest.mark.parametrize("where", [0, 1, 511, 512, 4095, 4096, 5166])
def test_the_largest_anywhere(ops, where):
    """In the first, a middle and the last block, at borders, and in an incomplete block."""
    logits = problem(2, 5167)
    logits[1, where] = 100.0
    assert check(ops, logits)[1] == where


# 2. Edges.


def test_no_rows(ops):
    assert check(ops, problem(0, 64)).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_of_equal_ones(ops, dtype):
    logits = problem(4, 5167, dtype=dtype).clamp_(max=1.0)
    for row, places in enumerate([(700, 701), (3, 5166), (512, 4096), (40, 72)]):
        logits[row, list(places)] = 2.0
    assert check(ops, logits).tolist() == [700, 3, 512, 40]


@pytest.mark.parametrize("dtype", DTYPES)
def test_negative_and_zero(ops, dtype):
    """Nothing that fills a block up counts, and -0 equals 0."""
    logits = -1 - problem(3, 5167, dtype=dtype).abs()
    logits[1, [9, 600]] = torch.tensor([-0.0, 0.0], dtype=dtype)
    logits[2] = torch.finfo(dtype).min
    assert check(ops, logits)[1:].tolist() == [9, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_numbers(ops, dtype):
    """Subnormal numbers differ."""
    logits = torch.zeros(2, 600, dtype=dtype)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    logits[0, 577] = least
    logits[1, :] = -least
    logits[1, 33] = 0.0
    assert check(ops, logits).tolist() == [577, 33]


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 40, 511, 4096, 5166])
def test_what_is_not_finite(ops, value, where):
    logits = problem(3, 5167)
    expected = ops.likeliest(logits)
    logits[1, where] = value
    actual = check(ops, logits)
    assert actual[1] == -1
    assert actual[[0, 2]].tolist() == expected[[0, 2]].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_finite(ops, dtype):
    logits = problem(1, 700, dtype=dtype)
    logits[0, 1::2] = torch.finfo(dtype).max
    logits[0, 2::2] = torch.finfo(dtype).min
    assert check(ops, logits).item() == 1


# 3. Batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(ops, dtype):
    logits = problem(50, 1536, dtype=dtype)
    expected = ops.likeliest(logits)
    for threads, rows in [(1, [7]), (2, [49]), (2, list(range(49, -1, -1)))]:
        with cpu_threads(threads):
            assert_same_bits(ops.likeliest(logits[rows]), expected[rows])


# 4. Bad arguments.

BAD = {
    "one dimension": Refusal("logits", ValueError, logits=lambda x: x[0]),
    "three dimensions": Refusal("logits", ValueError, logits=lambda x: x[None]),
    "no columns": Refusal("logits", ValueError, logits=lambda x: x[:, :0]),
    "strides": Refusal("logits", ValueError, logits=lambda x: x.T),
    "double": Refusal("logits", TypeError, logits=torch.Tensor.double),
    "int": Refusal("logits", TypeError, logits=torch.Tensor.int),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("likeliest", {"logits": problem(3, 8)}, route)


# 5. torch.compile.


def test_opcheck():
    torch.library.opcheck(torch.ops.baton_kernels.likeliest.default, (problem(3, 64),))


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        likeliest = staticmethod(
            torch.compile(baton_kernels.likeliest, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, 64))
    check(Compiled, problem(5, 64))


# 6. By hand.


def test_by_hand(ops):
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 0.0], [1.0, torch.nan, 2.0]])
    assert ops.likeliest(logits).tolist() == [1, 0, -1]
