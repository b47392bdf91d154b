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


def problem(*shape, dtype=torch.float32, residual=False, margin=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers():
        x = torch.randn(shape, generator=generator).to(dtype)
        return embed(x, [1] * (len(shape) - 1) + [margin])

    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    arguments = {"x": numbers(), "weight": weight, "eps": 1e-5}
    return arguments | {"residual": numbers()} if residual else arguments


def check(ops, arguments):
    before = {n: twin(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    with nan_in_empty():
        actual = ops.rms_norm(**arguments)
    args = [before.pop(name) for name in ("x", "weight", "eps")]
    assert_accurate(actual, "rms_norm", *args, **before)
    for name, x in zip(("x", "weight"), (args[0], args[1]), strict=True):
        assert_same_bits(storage(arguments[name]), storage(x), name)
    if "residual" in before:
        assert_same_bits(actual[1], args[0] + before["residual"], "sum")
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, residual, size):
    check(ops, problem(3, size, dtype=dtype, residual=residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_rows(ops, dtype, residual, rows):
    check(ops, problem(rows, 48, dtype=dtype, residual=residual, margin=3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_number_is_loaded_and_rounded_exactly(ops, dtype):
    """All 65536 bit patterns, added to each other, including subnormal, overflowing and halfway
    sums."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[None]
    weight = torch.ones(2**16, dtype=dtype)
    order = torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    for other in (x[:, order], torch.full_like(x, -0.0)):
        _, s = ops.rms_norm(x, weight, residual=other)
        expected = x + other
        assert torch.equal(s.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert_same_bits(s[numbers], expected[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [1024, 1000])
def test_large_results(ops, dtype, residual, size):
    """Results over 8 MiB, which the CPU writes past its caches, have the bits of a few rows."""
    rows = 2**23 // (1000 * dtype.itemsize) + 1
    arguments = problem(rows, size, dtype=dtype, residual=residual)
    with nan_in_empty():
        whole = ops.rms_norm(**arguments)
    few = slice(rows - 5, None)
    part = ops.rms_norm(
        **arguments | {n: arguments[n][few] for n in ("x", "residual") if n in arguments}
    )
    pairs = zip(whole, part, strict=True) if residual else [(whole, part)]
    for large, small in pairs:
        assert not large.isnan().any()
        assert_same_bits(large[few], small)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 64), (2, 1, 3, 40)])
@pytest.mark.parametrize("residual", [False, True])
def test_dimensions(ops, shape, residual):
    actual = check(ops, problem(*shape, residual=residual))
    y = actual[0] if residual else actual
    assert y.shape == shape and y.is_contiguous()


def test_contiguous_tensors(ops):
    arguments = problem(9, 64, residual=True)
    arguments |= {name: arguments[name].contiguous() for name in ("x", "residual")}
    check(ops, arguments)


# 2. Edges.


@pytest.mark.parametrize("residual", [False, True])
def test_no_rows(ops, residual):
    actual = check(ops, problem(0, 64, residual=residual))
    for y in actual if residual else (actual,):
        assert y.shape == (0, 64)


def test_default_eps(ops):
    arguments = problem(2, 64)
    x, weight = arguments["x"] * 1e-3, arguments["weight"]
    assert_same_bits(ops.rms_norm(x, weight), ops.rms_norm(x, weight, 1e-6))


def test_zeros(ops):
    arguments = problem(2, 64)
    arguments["x"].zero_()
    assert not check(ops, arguments).any()


def test_squares_past_the_range_of_half(ops):
    """Squares are summed in float32, where plain torch overflows in float16."""
    x = torch.full((2, 64), 3e4, dtype=torch.float16)
    x[:, ::2] = -3e4
    y = ops.rms_norm(x, torch.ones(64, dtype=torch.float16))
    assert_same_bits(y, x.sign())


# 3. Poison and batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_stays_in_its_row(ops, dtype):
    arguments = problem(5, 63, dtype=dtype)
    expected = ops.rms_norm(**arguments)
    arguments["x"][2] = torch.nan
    y = ops.rms_norm(**arguments)
    for i in (0, 1, 3, 4):
        assert_same_bits(y[i], expected[i])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", [63, 576])
def test_batch_invariance(ops, dtype, residual, size):
    arguments = problem(50, size, dtype=dtype, residual=residual)
    expected = ops.rms_norm(**arguments)
    for threads, rows in [(1, [7]), (2, [49]), (2, list(range(49, -1, -1)))]:
        other = dict(arguments)
        for name in ("x", "residual") if residual else ("x",):
            other[name] = arguments[name][rows]
        with cpu_threads(threads):
            actual = ops.rms_norm(**other)
        for got, want in zip(
            actual if residual else (actual,), expected if residual else (expected,), strict=True
        ):
            assert_same_bits(got, want[rows])


# 4. Bad arguments.

BAD = {
    "x without dimensions": Refusal("x", ValueError, x=torch.tensor(1.0)),
    "weight of other size": Refusal("weight", ValueError, weight=lambda x: x[:7]),
    "weight of two dimensions": Refusal("weight", ValueError, weight=lambda x: x[None]),
    "weight of other dtype": Refusal("weight", TypeError, weight=torch.Tensor.half),
    "residual of other shape": Refusal("residual", ValueError, residual=lambda x: x[:2]),
    "residual of other dtype": Refusal("residual", TypeError, residual=torch.Tensor.half),
    "double": Refusal(
        "x", TypeError, **dict.fromkeys(("x", "weight", "residual"), torch.Tensor.double)
    ),
    "int": Refusal("x", TypeError, **dict.fromkeys(("x", "weight", "residual"), torch.Tensor.int)),
    "eps below zero": Refusal("eps", ValueError, eps=-1e-6),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("rms_norm", problem(3, 8, residual=True), route)
    if BAD[name].changes.keys() <= {"x", "weight", "eps"}:
        BAD[name].check("rms_norm", problem(3, 8), route)


# 5. torch.compile.


@pytest.mark.parametrize("residual", [False, True])
def test_opcheck(residual):
    op = torch.ops.baton_kernels.rms_norm
    args = tuple(problem(3, 64, residual=residual).values())
    torch.library.opcheck(op.residual if residual else op.default, args)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("residual", [False, True])
def test_compile(residual):
    class Compiled:
        rms_norm = staticmethod(
            torch.compile(baton_kernels.rms_norm, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, 64, residual=residual))
    check(Compiled, problem(5, 64, residual=residual))


# 6. By hand.


def test_by_hand(ops):
    # The mean of 1, 49, 1, 49 is 25: everything is divided by 5.
    x = torch.tensor([[1.0, -7.0, 1.0, 7.0]])
    weight = torch.tensor([5.0, 10.0, 0.0, -5.0])
    expected = torch.tensor([[1.0, -14.0, 0.0, -7.0]])
    torch.testing.assert_close(ops.rms_norm(x, weight, 0.0), expected)
    y, s = ops.rms_norm(x - 2, weight, 0.0, residual=torch.full((1, 4), 2.0))
    torch.testing.assert_close(y, expected)
    assert s.tolist() == [[1.0, -7.0, 1.0, 7.0]]
