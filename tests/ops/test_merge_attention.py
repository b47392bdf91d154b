import math

import pytest
import torch

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_accurate,
    assert_same_bits,
    cpu_threads,
    embed,
    nan_in_empty,
    random_attention_problem,
    storage,
    twin,
)


def problem(rows, *, num_heads=3, head_dim=16, dtype=torch.float32, margin=8, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape):
        return torch.randn(shape, generator=generator)

    return {
        name: embed(numbers(rows, num_heads, head_dim).to(dtype), (1, 1, margin))
        if name.startswith("out")
        else 3 * numbers(rows, num_heads)
        for name in ("out_a", "lse_a", "out_b", "lse_b")
    }


def check(ops, arguments):
    before = {name: twin(x) for name, x in arguments.items()}
    with nan_in_empty():
        actual = ops.merge_attention(**arguments)
    assert_accurate(actual, "merge_attention", *before.values())
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(before[name]), name)
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, rows):
    check(ops, problem(rows, dtype=dtype))


@pytest.mark.parametrize("head_dim", [1, 16, 20, 24, 64, 80, 96, 128, 256, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dims(ops, head_dim, dtype):
    check(ops, problem(5, head_dim=head_dim, dtype=dtype, margin=3))


def test_contiguous_tensors(ops):
    check(ops, {name: x.contiguous() for name, x in problem(9).items()})


def test_merges_two_halves_of_the_keys(ops):
    def attention(*args):
        return reference.ragged_attention(*args, return_lse=True)

    whole = random_attention_problem([1, 1], [90, 700])
    parts = []
    for starts, lengths in (
        (whole.starts, whole.lengths // 3),
        (whole.starts + whole.lengths // 3, whole.lengths - whole.lengths // 3),
    ):
        args = (*whole.args[:5], starts, lengths)
        parts += attention(*args)

    assert_accurate(ops.merge_attention(*parts), attention, *whole.args)


# 2. Edges.


def test_no_rows(ops):
    out, lse = check(ops, problem(0))
    assert out.shape == (0, 3, 16) and lse.shape == (0, 3)


def test_parts_that_saw_nothing(ops):
    arguments = problem(4)
    arguments["lse_a"][:2] = -math.inf
    arguments["lse_b"][1:3] = -math.inf
    out, lse = check(ops, arguments)
    assert_same_bits(out[0], arguments["out_b"][0])
    assert_same_bits(out[2], arguments["out_a"][2])
    assert_same_bits(out[1], torch.zeros(3, 16))
    assert_same_bits(lse[0], arguments["lse_b"][0])
    assert (lse[1] == -math.inf).all()


def test_lse_far_apart(ops):
    arguments = problem(4)
    arguments["lse_a"] += 1e4
    arguments["lse_b"][2:] += 3e4
    check(ops, arguments)


# 3. Poison and batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_part_that_saw_nothing_is_not_read(ops, dtype):
    arguments = problem(4, dtype=dtype)
    arguments["lse_a"][1] = -math.inf
    expected = ops.merge_attention(**arguments)
    arguments["out_a"][1, :, ::2] = math.nan
    arguments["out_a"][1, :, 1::2] = math.inf
    for got, want in zip(ops.merge_attention(**arguments), expected, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(ops, dtype):
    arguments = problem(50, dtype=dtype, head_dim=24)
    expected = ops.merge_attention(**arguments)
    for threads, rows in [(1, [7]), (2, [49]), (2, list(range(49, -1, -1)))]:
        with cpu_threads(threads):
            actual = ops.merge_attention(**{name: x[rows] for name, x in arguments.items()})
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want[rows])


# 4. Bad arguments.

OUTS = ("out_a", "out_b")
BAD = {
    "out_a without heads": Refusal("out_a", ValueError, out_a=lambda x: x[:, 0]),
    "out_a strided in head_dim": Refusal(
        "out_a", ValueError, out_a=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "out_b of other shape": Refusal("out_b", ValueError, out_b=lambda x: x[:2]),
    "out_b of other dtype": Refusal("out_b", TypeError, out_b=torch.Tensor.half),
    "double": Refusal("out_a", TypeError, **dict.fromkeys(OUTS, torch.Tensor.double)),
    "lse_a half": Refusal("lse_a", TypeError, lse_a=torch.Tensor.half),
    "lse_b double": Refusal("lse_b", TypeError, lse_b=torch.Tensor.double),
    "lse_a of other rows": Refusal("lse_a", ValueError, lse_a=lambda x: x[:2]),
    "lse_b of other heads": Refusal("lse_b", ValueError, lse_b=lambda x: x[:, :2]),
    "lse_b of three dimensions": Refusal("lse_b", ValueError, lse_b=lambda x: x[..., None]),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("merge_attention", problem(3), route)


# 5. torch.compile.


def test_opcheck():
    args = tuple(problem(3).values())
    torch.library.opcheck(torch.ops.baton_kernels.merge_attention.default, args)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        merge_attention = staticmethod(
            torch.compile(baton_kernels.merge_attention, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3))
    check(Compiled, problem(5))


# 6. By hand.


def test_by_hand(ops):
    out_a, out_b = torch.full((1, 1, 16), 8.0), torch.full((1, 1, 16), 4.0)
    lse_a, lse_b = torch.tensor([[math.log(2.0)]]), torch.tensor([[math.log(6.0)]])
    out, lse = ops.merge_attention(out_a, lse_a, out_b, lse_b)
    torch.testing.assert_close(out, torch.full((1, 1, 16), 5.0))
    torch.testing.assert_close(lse, torch.tensor([[math.log(8.0)]]))
