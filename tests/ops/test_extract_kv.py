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
    nan_in_empty,
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
    """Poisoned caches with numbers in random places: arguments by name."""
    torch.manual_seed(sum(lengths))
    capacity = max(lengths, default=0) + 7 if capacity is None else capacity
    slots = [i % num_slots for i in torch.randperm(max(num_slots, len(lengths))).tolist()]
    starts = [int(torch.randint(capacity - n + 1, ())) for n in lengths]
    caches = {}
    for name in ("key_cache", "value_cache"):
        cache = embedded_cache(
            lambda shape: poison_(torch.empty(shape, dtype=dtype)),
            layers=layers, num_slots=num_slots, num_kv_heads=num_kv_heads,
            capacity=capacity, head_dim=head_dim, columns_first=columns_first, margin=margin,
        )  # fmt: skip
        for slot, start, length in zip(slots, starts, lengths, strict=False):
            columns = cache[..., slot, :, start : start + length, :]
            columns.copy_(torch.randn(columns.shape))
        caches[name] = cache
    return caches | {
        "cu_seqlens": cumulative(lengths),
        "slots": int32(slots[: len(lengths)]),
        "starts": int32(starts),
        "total_tokens": sum(lengths),
    }


def check(ops, arguments):
    before = {n: twin(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    with nan_in_empty():
        actual = ops.extract_kv(**arguments)
    expected = reference.extract_kv(**before)
    assert isinstance(actual, tuple) and len(actual) == 2
    for name, got, want in zip(("key", "value"), actual, expected, strict=True):
        assert_same_bits(got, want, name)
        assert got.is_contiguous()
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            assert_same_bits(storage(x), storage(before[name]), name)
    return actual


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, size):
    check(ops, problem([2, size, 0, 5], dtype=dtype))


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
def test_head_dims(ops, head_dim):
    check(ops, problem([9, 4], head_dim=head_dim, dtype=torch.bfloat16))


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("layers", [(), (1,), (3,)])
def test_layouts(ops, layers, columns_first):
    check(ops, problem([6, 70, 1], layers=layers, columns_first=columns_first))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_aligned_to_nothing(ops, dtype):
    check(ops, problem([6, 33], dtype=dtype, margin=3))


def test_contiguous_caches(ops):
    arguments = problem([6, 33])
    arguments |= {name: arguments[name].contiguous() for name in ("key_cache", "value_cache")}
    check(ops, arguments)


@pytest.mark.parametrize("layers", [(), (2,)])
def test_is_the_inverse_of_insert(ops, layers):
    arguments = problem([6, 33, 1], layers=layers, dtype=torch.float16)
    key, value = check(ops, arguments)
    del arguments["total_tokens"]
    expected = {name: twin(arguments[name]) for name in ("key_cache", "value_cache")}
    ops.insert_kv(key, value, **arguments)
    for name, cache in expected.items():
        assert_same_bits(storage(arguments[name]), storage(cache), name)


def buffers(arguments, margin=8, dtype=None):
    """Poisoned memory for key and value, larger than needed: slices in tokens and in head_dim."""
    cache = arguments["key_cache"]
    *layers, _, num_kv_heads, _, head_dim = cache.shape
    shape = (*layers, arguments["total_tokens"], num_kv_heads, head_dim)
    around = [0] * len(layers) + [2, 0, margin]
    return tuple(
        embed(poison_(torch.empty(shape, dtype=dtype or cache.dtype)), around) for _ in range(2)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [(), (3,)])
@pytest.mark.parametrize(
    ("head_dim", "margin"), [(16, 8), (16, 3), (128, 0)], ids=["aligned", "unaligned", "whole"]
)
def test_out(ops, dtype, layers, head_dim, margin):
    """The last one is long enough for stores that bypass the caches on a CPU."""
    arguments = problem([6, 70, 0, 300], layers=layers, dtype=dtype, head_dim=head_dim)
    out = buffers(arguments, margin)
    expected = reference.extract_kv(**arguments, out=tuple(map(twin, out)))
    caches = {name: twin(arguments[name]) for name in ("key_cache", "value_cache")}
    actual = ops.extract_kv(**arguments, out=out)
    for got, result, want in zip(out, actual, expected, strict=True):
        assert_same_bits(storage(got), storage(want), "out and what lies around it")
        assert_same_bits(result, got)
    for name, cache in caches.items():
        assert_same_bits(storage(arguments[name]), storage(cache), name)


def test_out_is_returned():
    arguments = problem([3, 2])
    out = buffers(arguments)
    actual = baton_kernels.extract_kv(**arguments, out=out)
    assert actual[0] is out[0] and actual[1] is out[1]


@pytest.mark.parametrize(("layers", "num_kv_heads"), [((21,), 3), ((), 9)])
def test_more_layers_or_heads_than_tokens(ops, layers, num_kv_heads):
    check(ops, problem([1, 4, 0, 2], layers=layers, num_kv_heads=num_kv_heads))


def test_many_queries(ops):
    """Most queries are empty, which makes finding a token's query harder."""
    check(ops, problem([0 if i % 7 > 2 else i % 4 for i in range(1100)], capacity=5))


# 2. Edges.


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_extract(ops, lengths):
    check(ops, problem(lengths))


def test_whole_capacity(ops):
    check(ops, problem([12, 12, 12, 12, 12], capacity=12))


def test_queries_share_slots_and_columns(ops):
    arguments = problem([4, 3, 3], capacity=10)
    arguments |= {"slots": int32([2, 2, 2]), "starts": int32([5, 2, 6])}
    check(ops, arguments)


# 3. Poison.


def test_padding_is_not_read(ops):
    arguments = problem([4, 63], dtype=torch.bfloat16)
    for out in check(ops, arguments):
        assert out.isfinite().all()


# 4. Bad arguments.


def arguments_to_spoil():
    arguments = problem([3, 2], num_slots=4, capacity=8)
    return arguments | {"slots": int32([1, 3]), "starts": int32([0, 6])}


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
    "key_cache strided in head_dim": Refusal(
        "key_cache", ValueError, key_cache=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "head_dim 20": Refusal(
        "head_dim|key_cache",
        NotImplementedError,
        **dict.fromkeys(CACHES, lambda x: torch.cat((x, x[..., :4]), -1)),
    ),
    "cu_seqlens int64": Refusal("cu_seqlens", TypeError, cu_seqlens=torch.Tensor.long),
    "slots int64": Refusal("slots", TypeError, slots=torch.Tensor.long),
    "starts of two dimensions": Refusal("starts", ValueError, starts=lambda x: x[None]),
    "a slot too few": Refusal("slots|starts|cu_seqlens", ValueError, slots=lambda x: x[:1]),
    "a start too few": Refusal("starts", ValueError, starts=lambda x: x[:1]),
    "total_tokens below zero": Refusal("total_tokens", ValueError, total_tokens=-1),
    "total_tokens too many": Refusal(
        "(total_tokens|cu_seqlens).*", ValueError, values=True, total_tokens=6
    ),
    "total_tokens too few": Refusal(
        "(total_tokens|cu_seqlens).*", ValueError, values=True, total_tokens=4
    ),
    "cu_seqlens from 1": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([1, 3, 5])
    ),
    "cu_seqlens falling": Refusal(
        "cu_seqlens.*", ValueError, values=True, cu_seqlens=int32([0, 6, 5])
    ),
    "slot past the end": Refusal("slots.*", ValueError, values=True, slots=int32([1, 4])),
    "slot below zero": Refusal("slots.*", ValueError, values=True, slots=int32([-1, 3])),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([-1, 0])),
    "end past capacity": Refusal("starts.*", ValueError, values=True, starts=int32([0, 7])),
    "end past 2**31": Refusal("starts.*", ValueError, values=True, starts=int32([0, 2**31 - 1])),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    BAD[name].check("extract_kv", arguments_to_spoil(), route)


BAD_OUT = {
    "a tensor": ("out", TypeError, lambda key, value: key),
    "one of them": ("out", TypeError, lambda key, value: (key,)),
    "other dtype": (r"out\[1\]", TypeError, lambda key, value: (key, value.half())),
    "a token too few": (r"out\[0\]", ValueError, lambda key, value: (key[1:], value)),
    "strided": (r"out\[1\]", ValueError, lambda key, value: (key, value.mT.contiguous().mT)),
    "expanded": (r"out\[0\]", ValueError, lambda key, value: (key[:1].expand_as(key), value)),
    "another device": (r"out\[1\]", ValueError, lambda key, value: (key, value.to("meta"))),
}


@pytest.mark.parametrize("name", BAD_OUT)
@pytest.mark.parametrize("route", ["python", "torch.ops"])
def test_bad_out(name, route):
    argument, error, change = BAD_OUT[name]
    arguments = arguments_to_spoil()
    out = change(*buffers(arguments))
    if route == "python":
        with pytest.raises(error, match=rf"extract_kv: {argument} must be .+, got .+"):
            baton_kernels.extract_kv(**arguments, out=out)
    elif argument != "out" and name != "another device":
        with pytest.raises(ValueError, match=rf"extract_kv: {argument} must be .+, got .+"):
            torch.ops.baton_kernels.extract_kv.out(*arguments.values(), *out)
    for x in out:
        if x.device.type == "cpu":
            assert not x.isfinite().any(), "written in spite of the refusal"


# 5. torch.compile.


@pytest.mark.parametrize("layers", [(), (2,)])
def test_opcheck(layers):
    arguments = problem([3, 2], layers=layers)
    total_tokens = arguments.pop("total_tokens")
    torch.library.opcheck(
        torch.ops.baton_kernels.extract_kv.default,
        tuple(arguments.values()),
        {"total_tokens": total_tokens},
    )


@pytest.mark.parametrize("layers", [(), (2,)])
def test_opcheck_out(layers):
    arguments = problem([3, 2], layers=layers)
    out = tuple(x.zero_() for x in buffers(arguments))
    torch.library.opcheck(
        torch.ops.baton_kernels.extract_kv.out, (*arguments.values(), *out)
    )  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_out():
    compiled = torch.compile(baton_kernels.extract_kv, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 2], [4, 5]):
        arguments = problem(lengths)
        out = buffers(arguments)
        expected = reference.extract_kv(**arguments)
        compiled(**arguments, out=out)
        for got, want in zip(out, expected, strict=True):
            assert_same_bits(got, want)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile():
    class Compiled:
        extract_kv = staticmethod(
            torch.compile(baton_kernels.extract_kv, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem([3, 2]))
    check(Compiled, problem([4, 5]))


# 6. By hand.


def test_by_hand(ops):
    key_cache = torch.arange(8.0).view(2, 1, 4, 1).repeat(1, 1, 1, 16)
    key, value = ops.extract_kv(
        key_cache, -key_cache, int32([0, 2, 3]), int32([1, 0]), int32([1, 3]), total_tokens=3
    )
    assert key.shape == (3, 1, 16)
    assert key[:, 0, 7].tolist() == [5, 6, 3]
    assert value[:, 0, 15].tolist() == [-5, -6, -3]
