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
    int32,
    nan_in_empty,
    storage,
    twin,
)


def problem(
    rows,
    query_length,
    key_length,
    *,
    num_heads=2,
    dtype=torch.float32,
    margin=8,
    end=None,
    window=None,
    seed=0,
):
    """Rows of random lengths that end in one column; scores of hidden columns are poisoned."""
    generator = torch.Generator().manual_seed(seed)
    end = key_length if end is None else end
    starts = torch.randint(end + 1, (rows,), generator=generator).int()
    shape = (rows, num_heads, query_length, key_length)
    scores = 3 * torch.randn(shape, generator=generator).to(dtype)
    mask = reference.attention_mask(starts, end - starts, query_length, key_length, window=window)
    scores = scores.masked_fill(~mask, math.nan)
    scores[..., ::3] = scores[..., ::3].masked_fill(~mask[..., ::3], math.inf)
    return {
        "scores": embed(scores, (1, 1, 1, margin)),
        "starts": starts,
        "lengths": end - starts,
        "scale": 0.7,
        "window": window,
    }


def check(ops, arguments):
    """Accurate on finite scores, and hidden scores change no bit."""
    clean = dict(arguments)
    clean["scores"] = twin(arguments["scores"]).nan_to_num_(0.0, 0.0, 0.0)
    before = twin(arguments["scores"])
    with nan_in_empty():
        actual = ops.masked_softmax(**arguments)
        assert_same_bits(actual, ops.masked_softmax(**clean), "weights")
    names = ("scores", "starts", "lengths")
    options = {name: clean[name] for name in ("scale", "window") if name in clean}
    assert_accurate(actual, "masked_softmax", *(clean[name] for name in names), **options)
    assert_same_bits(storage(arguments["scores"]), storage(before), "scores")
    assert actual.is_contiguous()
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
@pytest.mark.parametrize("query_length", [1, 9])
def test_matches_reference(ops, dtype, size, query_length):
    check(ops, problem(3, query_length, size, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 9, 63, 2**31 - 1])
def test_windows(ops, dtype, window):
    check(ops, problem(3, 20, 130, dtype=dtype, window=window, margin=3))


@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_rows(ops, rows):
    check(ops, problem(rows, 1, 33))


def test_columns_after_the_end(ops):
    check(ops, problem(4, 5, 60, end=41))


def test_contiguous_tensor(ops):
    arguments = problem(3, 4, 40)
    check(ops, arguments | {"scores": arguments["scores"].contiguous()})


# 2. Edges.


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8), (2, 3, 0)])
def test_nothing_to_do(ops, shape):
    rows, query_length, key_length = shape
    assert check(ops, problem(*shape)).shape == (rows, 2, query_length, key_length)


def test_no_heads(ops):
    assert check(ops, problem(2, 3, 8, num_heads=0)).shape == (2, 0, 3, 8)


def test_queries_that_see_nothing(ops):
    arguments = problem(3, 20, 8)
    weights = check(ops, arguments)
    blind = torch.arange(20) < 20 - arguments["lengths"][:, None]
    assert blind.any()
    hidden = weights.transpose(1, 2)[blind]
    assert_same_bits(hidden, torch.zeros_like(hidden))


def test_optionals_left_out(ops):
    arguments = problem(3, 4, 40)
    del arguments["scale"], arguments["window"]
    check(ops, arguments)


def test_large_scores(ops):
    check(ops, problem(3, 4, 40, dtype=torch.float16) | {"scale": 1e3})


# 3. Poison is part of every problem above. Batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(ops, dtype):
    """A row has the same bits by itself, elsewhere in the batch, and with more columns."""
    arguments = problem(20, 3, 90, dtype=dtype, num_heads=3)
    expected = ops.masked_softmax(**arguments)
    for i in range(0, 20, 3):
        start, length = int(arguments["starts"][i]), int(arguments["lengths"][i])
        for shift, threads in ((0, 1), (-start, 2), (7, 2)):
            scores = torch.full((1, 3, 3, 100), math.nan, dtype=dtype)
            own = arguments["scores"][i, :, :, start : start + length]
            scores[0, :, :, start + shift : start + shift + length] = own
            moved = {"scores": scores, "starts": int32([start + shift])}
            moved["lengths"] = int32([length])
            with cpu_threads(threads):
                actual = ops.masked_softmax(**arguments | moved)
            assert_same_bits(
                actual[0, :, :, start + shift : start + shift + length],
                expected[i, :, :, start : start + length],
            )


# 4. Bad arguments.


def arguments_to_spoil():
    return problem(3, 2, 8)


BAD = {
    "scores without heads": Refusal("scores", ValueError, scores=lambda x: x[:, 0]),
    "scores strided in the columns": Refusal(
        "scores", ValueError, scores=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "double": Refusal("scores", TypeError, scores=torch.Tensor.double),
    "starts int64": Refusal("starts", TypeError, starts=torch.Tensor.long),
    "starts of two dimensions": Refusal("starts", ValueError, starts=lambda x: x[None]),
    "starts of other rows": Refusal("starts", ValueError, starts=lambda x: x[:2]),
    "lengths float": Refusal("lengths", TypeError, lengths=torch.Tensor.float),
    "lengths of other rows": Refusal("lengths", ValueError, lengths=lambda x: x[:2]),
    "scale infinite": Refusal("scale", ValueError, scale=math.inf),
    "window 0": Refusal("window", ValueError, window=0),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([0, -1, 0])),
    "length below zero": Refusal("lengths.*", ValueError, values=True, lengths=int32([0, -1, 0])),
    "end past the columns": Refusal(
        "(starts|lengths).*",
        ValueError,
        values=True,
        starts=int32([0, 8, 0]),
        lengths=int32([1] * 3),
    ),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("masked_softmax", arguments_to_spoil(), route)


# 5. torch.compile.


def test_opcheck():
    arguments = problem(3, 2, 8, window=4)
    args = (torch.randn(3, 2, 2, 8), arguments["starts"], arguments["lengths"])
    torch.library.opcheck(
        torch.ops.baton_kernels.masked_softmax.default, args, {"scale": 0.5, "window": 4}
    )


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        masked_softmax = staticmethod(
            torch.compile(baton_kernels.masked_softmax, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, 2, 8))
    check(Compiled, problem(4, 5, 9))


# 6. By hand.


def test_by_hand(ops):
    # Weights 1 and 3, and 1, 3 and 4 once the last column is seen.
    scores = torch.tensor([math.nan, 0.0, math.log(3.0), math.log(4.0), math.nan])
    scores = scores.expand(1, 1, 3, 5).contiguous()
    weights = ops.masked_softmax(scores, int32([1]), int32([3]))
    expected = [[0, 1, 0, 0, 0], [0, 0.25, 0.75, 0, 0], [0, 0.125, 0.375, 0.5, 0]]
    torch.testing.assert_close(weights[0, 0], torch.tensor(expected))
    weights = ops.masked_softmax(scores, int32([1]), int32([3]), window=1)
    assert weights[0, 0].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]]
