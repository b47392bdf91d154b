import pytest
import torch

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import DTYPES, Refusal, assert_same_bits, int32, nan_in_empty


def problem(rows, query_length, key_length, *, end=None, seed=0):
    """Rows of random lengths that all end in one column, by default the last."""
    generator = torch.Generator().manual_seed(seed)
    end = key_length if end is None else end
    starts = torch.randint(end + 1, (rows,), generator=generator).int()
    return {
        "starts": starts,
        "lengths": end - starts,
        "query_length": query_length,
        "key_length": key_length,
    }


def check(ops, arguments, **options):
    with nan_in_empty():
        actual = ops.attention_mask(**arguments, **options)
    assert_same_bits(actual, reference.attention_mask(**arguments, **options), "mask")
    assert actual.is_contiguous()
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES])
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
@pytest.mark.parametrize("query_length", [1, 17])
def test_matches_reference(ops, dtype, size, query_length):
    check(ops, problem(5, query_length, size), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES])
@pytest.mark.parametrize("window", [1, 9, 63, 2**31 - 1])
def test_windows(ops, dtype, window):
    check(ops, problem(3, 40, 130), dtype=dtype, window=window)


@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_rows(ops, rows):
    check(ops, problem(rows, 2, 33))


def test_default_dtype_is_bool(ops):
    assert check(ops, problem(2, 3, 8)).dtype == torch.bool


def test_columns_after_the_end(ops):
    check(ops, problem(4, 5, 60, end=41))


def test_rows_that_end_apart(ops):
    arguments = {"starts": int32([0, 4, 2]), "lengths": int32([9, 1, 6])}
    check(ops, arguments | {"query_length": 3, "key_length": 10}, dtype=torch.float16)


# 2. Edges.


@pytest.mark.parametrize("shape", [(0, 3, 8), (3, 0, 8)])
def test_nothing_to_do(ops, shape):
    rows, query_length, key_length = shape
    mask = check(ops, problem(rows, query_length, key_length), dtype=torch.float32)
    assert mask.shape == (rows, 1, query_length, key_length)


def test_empty_rows_see_nothing(ops):
    arguments = {"starts": int32([8, 0]), "lengths": int32([0, 0])}
    assert not check(ops, arguments | {"query_length": 3, "key_length": 8}).any()


def test_more_queries_than_tokens(ops):
    check(ops, problem(3, 20, 8), dtype=torch.bfloat16, window=4)


@pytest.mark.parametrize("size", [2**31, 2**40])
def test_a_mask_that_no_memory_holds(size):
    """More bytes, or more elements, than 64 bits can count."""
    arguments = problem(1, size, size, end=8)
    with pytest.raises(RuntimeError):
        baton_kernels.attention_mask(**arguments, dtype=torch.float32)


# 3. Poison: the mask is made in uninitialized memory, which nan_in_empty fills.


def test_depends_on_its_row_alone(ops):
    arguments = problem(40, 3, 50)
    mask = ops.attention_mask(**arguments)
    for i in (0, 17, 39):
        row = arguments | {name: arguments[name][i : i + 1] for name in ("starts", "lengths")}
        assert_same_bits(ops.attention_mask(**row), mask[i : i + 1])


# 4. Bad arguments.


def arguments_to_spoil():
    return problem(3, 2, 8) | {"dtype": torch.bool}


BAD = {
    "starts int64": Refusal("starts", TypeError, starts=torch.Tensor.long),
    "starts of two dimensions": Refusal("starts", ValueError, starts=lambda x: x[None]),
    "starts not contiguous": Refusal(
        "starts", ValueError, starts=lambda x: x.repeat_interleave(2)[::2]
    ),
    "lengths float": Refusal("lengths", TypeError, lengths=torch.Tensor.float),
    "lengths of other rows": Refusal("lengths", ValueError, lengths=lambda x: x[:2]),
    "query_length below zero": Refusal("query_length", ValueError, query_length=-1),
    "key_length below zero": Refusal("key_length", ValueError, key_length=-1),
    "dtype int32": Refusal("dtype", TypeError, dtype=torch.int32),
    "dtype double": Refusal("dtype", TypeError, dtype=torch.float64),
    "window 0": Refusal("window", ValueError, window=0),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([0, -1, 0])),
    "length below zero": Refusal("lengths.*", ValueError, values=True, lengths=int32([0, -1, 0])),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("attention_mask", arguments_to_spoil(), route)


# 5. torch.compile.


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16])
def test_opcheck(dtype):
    args = tuple(problem(3, 2, 8).values())
    torch.library.opcheck(
        torch.ops.baton_kernels.attention_mask.default, args, {"dtype": dtype, "window": 4}
    )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compile(dynamic):
    class Compiled:
        attention_mask = staticmethod(
            torch.compile(
                baton_kernels.attention_mask, fullgraph=True, backend="aot_eager", dynamic=dynamic
            )
        )

    check(Compiled, problem(3, 2, 8), dtype=torch.float16)
    check(Compiled, problem(4, 5, 9), dtype=torch.float16)


# 6. By hand.


def test_by_hand(ops):
    starts, lengths = int32([0, 2, 4]), int32([5, 3, 1])
    mask = ops.attention_mask(starts, lengths, 2, 5)
    assert mask[:, 0].int().tolist() == [
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
        [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
        [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]],
    ]
    mask = ops.attention_mask(starts, lengths, 2, 5, dtype=torch.float16, window=2)
    low = -65504.0
    assert mask[:, 0].tolist() == [
        [[low, low, 0, 0, low], [low, low, low, 0, 0]],
        [[low, low, 0, 0, low], [low, low, low, 0, 0]],
        [[low, low, low, low, low], [low, low, low, low, 0]],
    ]
