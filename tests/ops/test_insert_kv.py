import pytest
import torch
from cache_problems import embedded_cache

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_same_bits,
    cumulative,
    embed,
    int32,
    poison_,
    storage,
    twin,
)


def problem(
    lengths,
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
    """Packed keys and values, caches full of numbers, and random places: arguments by name."""
    torch.manual_seed(sum(lengths))
    capacity = max(lengths, default=0) + 7 if capacity is None else capacity

    def numbers(shape):
        return torch.randn(shape).to(dtype)

    def new_tokens():
        shape = (*layers, sum(lengths), num_kv_heads, head_dim)
        return embed(numbers(shape), [1] * (len(shape) - 1) + [margin])

    def new_cache():
        return embedded_cache(
            numbers, layers=layers, num_slots=num_slots, num_kv_heads=num_kv_heads,
            capacity=capacity, head_dim=head_dim, columns_first=columns_first, margin=margin,
        )  # fmt: skip

    return {
        "key": new_tokens(),
        "value": new_tokens(),
        "key_cache": new_cache(),
        "value_cache": new_cache(),
        "cu_seqlens": cumulative(lengths),
        "slots": int32(torch.randperm(num_slots)[: len(lengths)].tolist()),
        "starts": int32([int(torch.randint(capacity - n + 1, ())) for n in lengths]),
    }


def check(ops, arguments, **options):
    """Compared with the reference, over all the memory behind the caches."""
    expected = {name: twin(x) for name, x in arguments.items()}
    assert ops.insert_kv(**arguments, **options) is None
    reference.insert_kv(**expected, **options)
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(expected[name]), name)


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, size):
    check(ops, problem([2, size, 0, 5], dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
def test_head_dims(ops, head_dim):
    check(ops, problem([9, 4], head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("layers", [(), (1,), (3,)])
def test_layouts(ops, layers, columns_first, zero_padding):
    arguments = problem([6, 70, 1], layers=layers, columns_first=columns_first)
    check(ops, arguments, zero_padding=zero_padding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_aligned_to_nothing(ops, dtype):
    check(ops, problem([6, 33], dtype=dtype, margin=3), zero_padding=True)


@pytest.mark.parametrize(("layers", "num_kv_heads"), [((21,), 3), ((), 9), ((2,), 35)])
@pytest.mark.parametrize("zero_padding", [False, True])
def test_more_layers_or_heads_than_tokens(ops, layers, num_kv_heads, zero_padding):
    arguments = problem([1, 4, 0, 2], layers=layers, num_kv_heads=num_kv_heads)
    check(ops, arguments, zero_padding=zero_padding)


@pytest.mark.parametrize("num_queries", [40, 1100])
def test_many_queries(ops, num_queries):
    """Most queries are empty, which makes finding a token's query harder."""
    lengths = [0 if i % 7 > 2 else i % 4 for i in range(num_queries)]
    check(ops, problem(lengths, num_slots=num_queries, capacity=5))


def test_contiguous_tensors_and_caches_of_different_strides(ops):
    arguments = problem([6, 33], columns_first=True)
    arguments |= {name: arguments[name].contiguous() for name in ("key", "key_cache")}
    check(ops, arguments)


# 2. Edges.


@pytest.mark.parametrize("zero_padding", [False, True])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_insert(ops, lengths, zero_padding):
    """The padding of an empty query is cleared as well."""
    check(ops, problem(lengths), zero_padding=zero_padding)


def test_whole_capacity(ops):
    check(ops, problem([12, 12, 12, 12, 12], capacity=12))


def test_adjacent_queries_of_one_slot(ops):
    arguments = problem([4, 3], capacity=10)
    arguments |= {"slots": int32([2, 2]), "starts": int32([5, 2])}
    check(ops, arguments)


# 3. Poison.


def test_padding_keeps_its_bits_and_poison_is_copied(ops):
    arguments = problem([4, 3], dtype=torch.float16)
    poison_(arguments["key_cache"])
    poison_(arguments["value"])
    check(ops, arguments)


def test_zero_padding_clears_left_padding_alone(ops):
    arguments = problem([4, 3], capacity=12)
    arguments["starts"] = int32([5, 0])
    for name in ("key_cache", "value_cache"):
        poison_(arguments[name])
    check(ops, arguments, zero_padding=True)
    slot = int(arguments["slots"][0])
    assert_same_bits(
        arguments["key_cache"][slot, :, :5], torch.zeros(2, 5, 16), "padding of the first query"
    )
    assert not arguments["key_cache"][slot, :, 9:].isfinite().any()


# 4. Bad arguments.


def arguments_to_spoil():
    arguments = problem([3, 2], num_slots=4, capacity=8)
    return arguments | {"slots": int32([1, 3]), "starts": int32([0, 6])}


BAD = {
    "key without heads": Refusal("key", ValueError, key=lambda x: x[:, 0]),
    "key of other heads": Refusal("key", ValueError, key=lambda x: x[:, :1]),
    "key of other head_dim": Refusal("key", ValueError, key=lambda x: x[..., :8]),
    "key strided in head_dim": Refusal(
        "key", ValueError, key=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "value shorter than key": Refusal("value", ValueError, value=lambda x: x[:4]),
    "value of other dtype": Refusal("value", TypeError, value=lambda x: x.half()),
    "key_cache of other dtype": Refusal(
        "key|(key|value)_cache", TypeError, key_cache=lambda x: x.bfloat16()
    ),
    "double": Refusal(
        "key|key_cache",
        TypeError,
        **{name: torch.Tensor.double for name in ("key", "value", "key_cache", "value_cache")},
    ),
    "key_cache of three dimensions": Refusal("key_cache|key", ValueError, key_cache=lambda x: x[0]),
    "key_cache with layers, key without": Refusal(
        "key_cache|key", ValueError, key_cache=lambda x: x[None], value_cache=lambda x: x[None]
    ),
    "value_cache of other capacity": Refusal(
        "value_cache", ValueError, value_cache=lambda x: x[:, :, :7]
    ),
    "key_cache strided in head_dim": Refusal(
        "key_cache", ValueError, key_cache=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "head_dim 20": Refusal(
        "head_dim|key_cache",
        NotImplementedError,
        **{
            name: lambda x: torch.cat((x, x[..., :4]), -1)
            for name in ("key", "value", "key_cache", "value_cache")
        },
    ),
    "cu_seqlens int64": Refusal("cu_seqlens", TypeError, cu_seqlens=torch.Tensor.long),
    "slots int64": Refusal("slots", TypeError, slots=torch.Tensor.long),
    "starts float": Refusal("starts", TypeError, starts=torch.Tensor.float),
    "slots of two dimensions": Refusal("slots", ValueError, slots=lambda x: x[None]),
    "slots not contiguous": Refusal(
        "slots", ValueError, slots=lambda x: x.repeat_interleave(2)[::2]
    ),
    "a slot too few": Refusal("slots|starts|cu_seqlens", ValueError, slots=lambda x: x[:1]),
    "a start too many": Refusal("starts", ValueError, starts=int32([0, 0, 0])),
    "cu_seqlens empty": Refusal("cu_seqlens|slots", ValueError, cu_seqlens=int32([])),
    "cu_seqlens from 1": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([1, 3, 5])
    ),
    "cu_seqlens falling": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([0, 6, 5])
    ),
    "cu_seqlens past the end": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([0, 3, 6])
    ),
    "cu_seqlens short of the end": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([0, 3, 4])
    ),
    "slot past the end": Refusal("slots.*", ValueError, values=True, slots=int32([1, 4])),
    "slot below zero": Refusal("slots.*", ValueError, values=True, slots=int32([-1, 3])),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([0, -1])),
    "end past capacity": Refusal("starts.*", ValueError, values=True, starts=int32([0, 7])),
    "end past 2**31": Refusal("starts.*", ValueError, values=True, starts=int32([0, 2**31 - 1])),
    "overlap": Refusal(
        "(slots|starts|targets?).*",
        ValueError,
        values=True,
        slots=int32([1, 1]),
        starts=int32([0, 2]),
    ),
}


@pytest.mark.parametrize(
    "through", [baton_kernels, torch.ops.baton_kernels], ids=["python", "torch.ops"]
)
def test_cleared_padding_counts_as_a_target(through):
    """Two queries side by side in one slot: clearing before the second would wipe the first."""
    arguments = arguments_to_spoil() | {"slots": int32([1, 1]), "starts": int32([0, 6])}
    before = twin(arguments["key_cache"])
    with pytest.raises(ValueError, match="insert_kv: .* must be .*, got .*"):
        through.insert_kv(**arguments, zero_padding=True)
    assert_same_bits(storage(arguments["key_cache"]), storage(before))


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("insert_kv", arguments_to_spoil(), route)


# 5. torch.compile.


@pytest.mark.parametrize("layers", [(), (2,)])
def test_opcheck(layers):
    arguments = problem([3, 2], layers=layers)
    args = tuple(arguments.values())
    torch.library.opcheck(torch.ops.baton_kernels.insert_kv.default, args, {"zero_padding": True})


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    compiled = torch.compile(baton_kernels.insert_kv, fullgraph=True, backend="aot_eager")

    class Compiled:
        insert_kv = staticmethod(compiled)

    check(Compiled, problem([3, 2]), zero_padding=True)
    check(Compiled, problem([4]))


# 6. By hand.


def test_by_hand(ops):
    key = torch.arange(3.0)[:, None, None].expand(3, 1, 16).contiguous() + 1
    cache = torch.full((2, 1, 4, 16), 9.0)
    value_cache = cache.clone()
    ops.insert_kv(key, -key, cache, value_cache, int32([0, 2, 3]), int32([1, 0]), int32([1, 3]))
    assert cache[:, 0, :, 5].tolist() == [[9, 9, 9, 3], [9, 1, 2, 9]]
    assert value_cache[:, 0, :, 15].tolist() == [[9, 9, 9, -3], [9, -1, -2, 9]]
    ops.insert_kv(
        key, -key, cache, value_cache, int32([0, 3]), int32([0]), int32([1]), zero_padding=True
    )
    assert cache[:, 0, :, 0].tolist() == [[0, 1, 2, 3], [9, 1, 2, 9]]
