import pytest
import torch
from cache_problems import embedded_cache

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
    poison_,
    storage,
    twin,
)


def problem(
    rows,
    *,
    num_heads=4,
    num_kv_heads=2,
    num_slots=6,
    capacity=None,
    head_dim=16,
    dtype=torch.float32,
    rotary="half",
    rotary_dtype=torch.float32,
    query=True,
    columns_first=False,
    margin=8,
    seed=0,
):
    """One token per row for random distinct places: arguments by name.

    ``rotary``: "half" or "full" head_dim of cos and sin, or None.
    """
    generator = torch.Generator().manual_seed(seed)
    capacity = rows // num_slots + 9 if capacity is None else capacity

    def normal(shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def numbers(*shape):
        return embed(normal(shape), [1] * (len(shape) - 1) + [margin])

    arguments = {"key": numbers(rows, num_kv_heads, head_dim)}
    arguments["value"] = numbers(rows, num_kv_heads, head_dim)
    for name in ("key_cache", "value_cache"):
        arguments[name] = embedded_cache(
            normal, num_slots=num_slots, num_kv_heads=num_kv_heads, capacity=capacity,
            head_dim=head_dim, columns_first=columns_first, margin=margin,
        )  # fmt: skip
    places = torch.randperm(num_slots * capacity, generator=generator)[:rows]
    arguments["slots"] = (places // capacity).int()
    arguments["columns"] = (places % capacity).int()
    if query:
        arguments["query"] = numbers(rows, num_heads, head_dim)
    if rotary:
        width = head_dim if rotary == "full" else head_dim // 2
        angle = torch.rand(rows, width, generator=generator) * 6.28
        arguments["cos"] = embed(angle.cos().to(rotary_dtype), (1, margin))
        arguments["sin"] = embed(angle.sin().to(rotary_dtype), (1, margin))
    return arguments


def appended(arguments):
    """The result of the reference, and what it writes for each row."""
    names = list(arguments)

    def run(*args):
        given = dict(zip(names, args, strict=True))
        given |= {name: given[name].clone() for name in ("key_cache", "value_cache")}
        out = reference.append_kv(**given)
        key = given["key_cache"][given["slots"], :, given["columns"]]
        return (key,) if out is None else (key, out)

    return run


def check(ops, arguments):
    """The rotated tensors are accurate, the values equal, and nothing else is written."""
    before = {name: twin(x) for name, x in arguments.items()}
    out = ops.append_kv(**arguments)
    slots, columns = before["slots"], before["columns"]
    key = arguments["key_cache"][slots, :, columns]
    if "cos" in arguments:
        actual = (key,) if out is None else (key, out)
        assert_accurate(actual, appended(before), *before.values())
    else:
        assert_same_bits(key, before["key"])
        if out is not None:
            assert_same_bits(out, before["query"])
    assert (out is None) == ("query" not in arguments)
    before["key_cache"][slots, :, columns] = key
    before["value_cache"][slots, :, columns] = before["value"]
    for name, x in arguments.items():
        assert_same_bits(storage(x), storage(before[name]), name)
    return out


# 1. The reference.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 63, 128, 1000])
def test_matches_reference(ops, dtype, rows):
    out = check(ops, problem(rows, dtype=dtype))
    assert out.is_contiguous()


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("rotary", ["half", "full"])
def test_head_dims(ops, head_dim, rotary):
    check(ops, problem(5, head_dim=head_dim, rotary=rotary, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(14, 5), (1, 1), (32, 8)])
def test_the_same_bits_in_a_large_batch(ops, dtype, num_heads, num_kv_heads):
    """Kernels may have a separate path for many rows of 128 dims."""
    arguments = problem(
        65, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=128, dtype=dtype
    )
    few = {name: twin(x) for name, x in arguments.items()}
    out = check(ops, arguments)
    few |= {name: few[name][3:5] for name in few if not name.endswith("cache")}
    assert_same_bits(ops.append_kv(**few), out[3:5])
    places = few["slots"], slice(None), few["columns"]
    assert_same_bits(few["key_cache"][places], arguments["key_cache"][places])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary", ["half", "full"])
@pytest.mark.parametrize(("columns_first", "margin"), [(True, 8), (False, 3)])
def test_layouts(ops, dtype, rotary, columns_first, margin):
    check(
        ops,
        problem(
            7,
            dtype=dtype,
            rotary=rotary,
            rotary_dtype=dtype,
            columns_first=columns_first,
            margin=margin,
        ),
    )


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (8, 1), (9, 3)])
def test_heads(ops, num_heads, num_kv_heads):
    check(ops, problem(5, num_heads=num_heads, num_kv_heads=num_kv_heads, dtype=torch.bfloat16))


def test_contiguous_tensors(ops):
    check(ops, {name: x.contiguous() for name, x in problem(9).items()})


# 2. Edges.


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("rotary", [None, "half"])
@pytest.mark.parametrize("rows", [0, 3])
def test_optionals_left_out(ops, rows, rotary, query):
    check(ops, problem(rows, rotary=rotary, query=query))


def test_returned_query_is_a_copy(ops):
    arguments = problem(3, rotary=None)
    out = ops.append_kv(**arguments)
    out.zero_()
    assert arguments["query"].isfinite().all() and arguments["query"].all()


def test_every_place_of_the_cache(ops):
    check(ops, problem(24, num_slots=4, capacity=6, dtype=torch.bfloat16))


# 3. Poison.


def test_poisoned_cache_keeps_its_bits(ops):
    arguments = problem(4, dtype=torch.bfloat16)
    for name in ("key_cache", "value_cache"):
        poison_(arguments[name])
    check(ops, arguments)


def test_poison_is_copied_without_rotation(ops):
    arguments = problem(4, rotary=None)
    poison_(arguments["key"])
    poison_(arguments["value"])
    check(ops, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 80, 128])
def test_batch_invariance(ops, dtype, head_dim):
    arguments = problem(40, dtype=dtype, head_dim=head_dim)
    out = ops.append_kv(**arguments)
    key = arguments["key_cache"][arguments["slots"], :, arguments["columns"]]
    for threads, rows in [(1, [7]), (2, [39]), (1, [5, 31, 2]), (2, list(range(39, -1, -1)))]:
        other = problem(len(rows), dtype=dtype, head_dim=head_dim, capacity=50, seed=3)
        per_row = ("key", "value", "query", "cos", "sin")
        other |= {name: arguments[name][rows] for name in per_row}
        with cpu_threads(threads):
            assert_same_bits(ops.append_kv(**other), out[rows])
        assert_same_bits(other["key_cache"][other["slots"], :, other["columns"]], key[rows])


# 4. Bad arguments.


def arguments_to_spoil():
    arguments = problem(3, num_slots=4, capacity=8)
    return arguments | {"slots": int32([1, 3, 1]), "columns": int32([0, 7, 5])}


PACKED = ("key", "value", "query", "key_cache", "value_cache")
BAD = {
    "key with layers": Refusal("key", ValueError, key=lambda x: x[None]),
    "key of other heads": Refusal("key", ValueError, key=lambda x: x[:, :1]),
    "key strided in head_dim": Refusal(
        "key", ValueError, key=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "a key too few": Refusal("key|value|slots", ValueError, key=lambda x: x[:2]),
    "a value too few": Refusal("value", ValueError, value=lambda x: x[:2]),
    "value of other dtype": Refusal("value", TypeError, value=torch.Tensor.half),
    "query of other dtype": Refusal("query", TypeError, query=torch.Tensor.half),
    "query of other rows": Refusal("query", ValueError, query=lambda x: x[:2]),
    "query of other head_dim": Refusal("query", ValueError, query=lambda x: x[..., :8]),
    "query without heads": Refusal("query", ValueError, query=lambda x: x[:, 0]),
    "caches with layers": Refusal(
        "key|key_cache", ValueError, key_cache=lambda x: x[None], value_cache=lambda x: x[None]
    ),
    "key_cache of other dtype": Refusal(
        "key|(key|value)_cache", TypeError, key_cache=torch.Tensor.half
    ),
    "value_cache of other shape": Refusal("value_cache", ValueError, value_cache=lambda x: x[1:]),
    "double": Refusal("key|key_cache", TypeError, **dict.fromkeys(PACKED, torch.Tensor.double)),
    "head_dim 8": Refusal(
        "head_dim|key|key_cache",
        NotImplementedError,
        **dict.fromkeys(PACKED, lambda x: x[..., :8]),
        **dict.fromkeys(("cos", "sin"), lambda x: x[..., :4]),
    ),
    "head_dim 264": Refusal(
        "head_dim|key|key_cache",
        NotImplementedError,
        **dict.fromkeys(PACKED, lambda x: x[..., :1].repeat(1, *[1] * (x.dim() - 2), 264)),
        **dict.fromkeys(("cos", "sin"), lambda x: x[..., :1].repeat(1, 132)),
    ),
    "cos without sin": Refusal("(cos|sin).*", ValueError, sin=None),
    "sin without cos": Refusal("(cos|sin).*", ValueError, cos=None),
    "cos of other width": Refusal("cos", ValueError, cos=lambda x: x[:, :7]),
    "cos of other rows": Refusal("cos", ValueError, cos=lambda x: x[:2]),
    "sin of other shape": Refusal("sin", ValueError, sin=lambda x: x.repeat(1, 2)),
    "cos of other dtype": Refusal("cos", TypeError, cos=torch.Tensor.half),
    "cos and sin double": Refusal(
        "cos", TypeError, cos=torch.Tensor.double, sin=torch.Tensor.double
    ),
    "slots int64": Refusal("slots", TypeError, slots=torch.Tensor.long),
    "columns int64": Refusal("columns", TypeError, columns=torch.Tensor.long),
    "columns of other rows": Refusal("columns", ValueError, columns=int32([1, 2])),
    "columns of two dimensions": Refusal("columns", ValueError, columns=lambda x: x[:, None]),
    "slot past the end": Refusal("slots.*", ValueError, values=True, slots=int32([1, 4, 0])),
    "slot below zero": Refusal("slots.*", ValueError, values=True, slots=int32([1, 3, -1])),
    "column past the end": Refusal("columns.*", ValueError, values=True, columns=int32([0, 8, 5])),
    "column below zero": Refusal("columns.*", ValueError, values=True, columns=int32([0, -1, 5])),
    "one place twice": Refusal(
        "(slots|columns).*", ValueError, values=True, columns=int32([5, 7, 5])
    ),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    arguments = arguments_to_spoil()
    BAD[name].check("append_kv", arguments, route)
    if "query" not in BAD[name].changes:
        del arguments["query"]
        BAD[name].check("append_kv", arguments, route)


# 5. torch.compile.


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("rotary", ["full", "half", None])
def test_opcheck(query, rotary):
    op = torch.ops.baton_kernels.append_kv
    arguments = problem(3, query=query, rotary=rotary)
    args = tuple(arguments.pop(name) for name in list(arguments)[: 7 if query else 6])
    torch.library.opcheck(op.query if query else op.default, args, arguments)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("query", [True, False])
def test_compile(query):
    class Compiled:
        append_kv = staticmethod(
            torch.compile(baton_kernels.append_kv, fullgraph=True, backend="aot_eager")
        )

    check(Compiled, problem(3, query=query))
    check(Compiled, problem(5, query=query))


# 6. By hand.


def test_by_hand(ops):
    # A quarter turn (cos 0, sin 1) takes (x1, x2) to (-x2, x1).
    key = torch.tensor([1.0] * 8 + [2.0] * 8).view(1, 1, 16)
    cache = torch.zeros(2, 1, 3, 16)
    value_cache = torch.zeros(2, 1, 3, 16)
    cos, sin = torch.zeros(1, 8), torch.ones(1, 8)
    places = int32([1]), int32([2])
    out = ops.append_kv(key, key * 5, cache, value_cache, *places, query=key * 10, cos=cos, sin=sin)
    assert cache[1, 0, 2].tolist() == [-2.0] * 8 + [1.0] * 8
    assert value_cache[1, 0, 2].tolist() == [5.0] * 8 + [10.0] * 8
    assert out[0, 0].tolist() == [-20.0] * 8 + [10.0] * 8
    assert cache[:, 0, :, 0].tolist() == [[0, 0, 0], [0, 0, -2]]
