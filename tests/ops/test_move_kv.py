import pytest
import torch
from cache_problems import embedded_cache

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_same_bits,
    int32,
    poison_,
    storage,
    twin,
)

INDICES = ("source_slots", "source_starts", "target_slots", "target_starts", "lengths")


def problem(
    moves,
    *,
    layers=(),
    num_slots=5,
    num_kv_heads=2,
    capacity=None,
    head_dim=16,
    dtype=torch.float32,
    columns_first=False,
    margin=8,
):
    """Caches full of numbers, moves (source slot, start, target slot, start, length): by name."""
    torch.manual_seed(len(moves))
    if capacity is None:
        capacity = max((max(m[1], m[3]) + m[4] for m in moves), default=0) + 3
    caches = {
        name: embedded_cache(
            lambda shape: torch.randn(shape).to(dtype),
            layers=layers, num_slots=num_slots, num_kv_heads=num_kv_heads,
            capacity=capacity, head_dim=head_dim, columns_first=columns_first, margin=margin,
        )
        for name in ("key_cache", "value_cache")
    }  # fmt: skip
    return caches | {name: int32([m[i] for m in moves]) for i, name in enumerate(INDICES)}


def check(ops, arguments):
    """Compared with the reference, over all the memory behind the caches."""
    expected = {name: twin(x) for name, x in arguments.items()}
    assert ops.move_kv(**arguments) is None
    reference.move_kv(**expected)
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(expected[name]), name)


def everywhere(size):
    """A shift to the right, one to the left, one to another slot and one that goes nowhere."""
    return [(0, 0, 0, 5, size), (1, 9, 1, 2, size), (2, 4, 3, 1, size), (4, 1, 4, 1, size)]


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, size):
    check(ops, problem(everywhere(size), dtype=dtype))


@pytest.mark.parametrize("shift", [1, 7, 64, 99, 100, 101])
@pytest.mark.parametrize("columns_first", [False, True])
def test_overlap_with_itself(ops, shift, columns_first):
    moves = [(0, 0, 0, shift, 100), (1, shift, 1, 0, 100)]
    check(ops, problem(moves, columns_first=columns_first, dtype=torch.float16))


@pytest.mark.parametrize("shift", [70, 131, 300])
def test_long_overlap(ops, shift):
    """Shifts so long that several blocks may share a row."""
    moves = [(0, 0, 0, shift, 333), (1, shift, 1, 2, 333)]
    check(ops, problem(moves, head_dim=256, num_kv_heads=1, dtype=torch.bfloat16))


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
def test_head_dims(ops, head_dim):
    check(ops, problem(everywhere(9), head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("layers", [(), (1,), (3,)])
def test_layouts(ops, layers, columns_first):
    check(ops, problem(everywhere(20), layers=layers, columns_first=columns_first))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_aligned_to_nothing(ops, dtype):
    check(ops, problem(everywhere(33), dtype=dtype, margin=3))


def test_contiguous_caches(ops):
    check(ops, {name: x.contiguous() for name, x in problem(everywhere(10)).items()})


# 2. Edges.


@pytest.mark.parametrize("moves", [[], [(0, 0, 1, 0, 0)], [(0, 3, 0, 0, 0), (1, 1, 1, 1, 0)]])
def test_nothing_to_move(ops, moves):
    check(ops, problem(moves))


def test_whole_capacity(ops):
    check(ops, problem([(0, 0, 1, 0, 12), (2, 0, 2, 0, 12), (3, 0, 4, 0, 12)], capacity=12))


def test_one_source_for_several_targets(ops):
    check(ops, problem([(0, 2, 1, 0, 6), (0, 3, 2, 1, 6), (0, 2, 0, 9, 6)]))


def test_neighboring_moves_of_one_slot(ops):
    check(ops, problem([(0, 0, 0, 6, 3), (0, 3, 0, 9, 3)]))


# 3. Poison.


def test_padding_keeps_its_bits_and_poison_is_moved(ops):
    arguments = problem(everywhere(20), dtype=torch.bfloat16)
    for name in ("key_cache", "value_cache"):
        numbers = arguments[name].clone()
        poison_(arguments[name])
        arguments[name][:, :, 2:17] = numbers[:, :, 2:17]
    check(ops, arguments)


# 4. Bad arguments.


def arguments_to_spoil():
    return problem([(0, 0, 0, 2, 5), (1, 3, 2, 0, 4)], num_slots=4, capacity=8)


CACHES = ("key_cache", "value_cache")
BAD = {
    "key_cache of three dimensions": Refusal("key_cache", ValueError, key_cache=lambda x: x[0]),
    "value_cache with layers, key_cache without": Refusal(
        "value_cache", ValueError, value_cache=lambda x: x[None]
    ),
    "value_cache of other capacity": Refusal(
        "value_cache", ValueError, value_cache=lambda x: x[:, :, :7]
    ),
    "value_cache of other dtype": Refusal("value_cache", TypeError, value_cache=torch.Tensor.half),
    "double": Refusal("key_cache", TypeError, **dict.fromkeys(CACHES, torch.Tensor.double)),
    "value_cache strided in head_dim": Refusal(
        "value_cache", ValueError, value_cache=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "head_dim 20": Refusal(
        "head_dim|key_cache",
        NotImplementedError,
        **dict.fromkeys(CACHES, lambda x: torch.cat((x, x[..., :4]), -1)),
    ),
    **{f"{name} int64": Refusal(name, TypeError, **{name: torch.Tensor.long}) for name in INDICES},
    **{
        f"{name} of two dimensions": Refusal(name, ValueError, **{name: lambda x: x[None]})
        for name in INDICES
    },
    **{
        f"a {name[:-1]} too few": Refusal(name, ValueError, **{name: lambda x: x[:1]})
        for name in INDICES[1:]
    },
    "source slot past the end": Refusal(
        "source_slots.*", ValueError, values=True, source_slots=int32([0, 4])
    ),
    "target slot below zero": Refusal(
        "target_slots.*", ValueError, values=True, target_slots=int32([0, -1])
    ),
    "source start below zero": Refusal(
        "source_starts.*", ValueError, values=True, source_starts=int32([0, -1])
    ),
    "source past capacity": Refusal(
        "source_starts.*", ValueError, values=True, source_starts=int32([0, 5])
    ),
    "target past capacity": Refusal(
        "target_starts.*", ValueError, values=True, target_starts=int32([4, 0])
    ),
    "target past 2**31": Refusal(
        "target_starts.*", ValueError, values=True, target_starts=int32([2**31 - 1, 0])
    ),
    "length below zero": Refusal("lengths.*", ValueError, values=True, lengths=int32([5, -1])),
    "two targets overlap": Refusal(
        "target.*",
        ValueError,
        values=True,
        source_slots=int32([0, 1]),
        target_slots=int32([2, 2]),
        target_starts=int32([3, 0]),
    ),
    "a target overlaps the source of another": Refusal(
        "(target|source).*", ValueError, values=True, target_slots=int32([1, 2])
    ),
    "two rows change places": Refusal(
        "(target|source).*",
        ValueError,
        values=True,
        target_slots=int32([1, 0]),
        target_starts=int32([0, 0]),
    ),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("move_kv", arguments_to_spoil(), route)


# 5. torch.compile.


@pytest.mark.parametrize("layers", [(), (2,)])
def test_opcheck(layers):
    args = tuple(problem(everywhere(5), layers=layers).values())
    torch.library.opcheck(torch.ops.baton_kernels.move_kv.default, args)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        move_kv = staticmethod(
            torch.compile(baton_kernels.move_kv, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(everywhere(5)))
    check(Compiled, problem([(0, 0, 1, 1, 5)]))


# 6. By hand.


def test_by_hand(ops):
    cache = torch.arange(8.0).view(2, 1, 4, 1).repeat(1, 1, 1, 16)
    value_cache = -cache
    ops.move_kv(
        cache,
        value_cache,
        int32([0, 1]),
        int32([0, 3]),
        int32([0, 1]),
        int32([1, 0]),
        int32([3, 1]),
    )
    assert cache[:, 0, :, 9].tolist() == [[0, 0, 1, 2], [7, 5, 6, 7]]
    assert value_cache[:, 0, :, 9].tolist() == [[0, 0, -1, -2], [-7, -5, -6, -7]]
