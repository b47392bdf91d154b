"""Tokens copied into, within and out of eight-bit caches."""

import math

import pytest
import torch
from eight_bit import EIGHT_BITS, embed_bits, poison_eight

import baton_kernels
from baton_kernels import reference
from baton_kernels.reference._eight_bit import dequantize, quantize
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_same_bits,
    cumulative,
    embed,
    int32,
    storage,
    twin,
)

BACKENDS_OF, ONLY_ON = "insert_kv", "cpu-"
NAMES = ("key_cache", "value_cache", "key_scale", "value_scale")


def caches(stored, *, layers=(), slots=4, heads=2, capacity=50, dim=16, columns_first=False):
    """Filled with poison, in the middle of larger poisoned memory."""
    sizes = (capacity, heads) if columns_first else (heads, capacity)
    result = {}
    for name in ("key", "value"):
        cache = embed_bits(poison_eight(torch.empty(*layers, slots, *sizes, dim, dtype=stored)))
        scale = embed(torch.full((*layers, slots, *sizes), float("nan")))
        if columns_first:
            cache, scale = cache.transpose(-3, -2), scale.transpose(-2, -1)
        result[f"{name}_cache"], result[f"{name}_scale"] = cache, scale
    return result


def tokens(count, dtype, *, layers=(), heads=2, dim=16, seed=0):
    """Elements of very different sizes, with heads of zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *layers, count, heads, dim, generator=generator)
    x *= 10.0 ** torch.randint(-4, 3, (*x.shape[:-1], 1), generator=generator)
    x[..., ::7, 0, :] = 0.0
    return [embed(part) for part in x.to(dtype)]


def twins(arguments):
    return {name: twin(x) if name in NAMES else x for name, x in arguments.items()}


def bits(x):
    return storage(x).view(torch.uint8) if x.element_size() == 1 else storage(x)


def check_written(op, arguments, expected):
    """The op writes what the reference writes; margins are compared too."""
    getattr(op, expected[0])(**arguments)
    for name in NAMES:
        assert_same_bits(bits(arguments[name]), bits(expected[1][name]), name)


# 1. Compared with the reference.


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers, dim, columns_first, zero_padding", [
    ((), 16, False, False), ((3,), 24, True, True), ((), 64, True, False), ((2,), 80, False, True),
    ((), 128, False, False), ((), 256, False, True),
])  # fmt: skip
def test_insert(ops, layers, dim, columns_first, zero_padding, dtype, stored):
    lengths = [3, 0, 29]
    key, value = tokens(sum(lengths), dtype, layers=layers, dim=dim)
    arguments = {
        "key": key, "value": value,
        **caches(stored, layers=layers, dim=dim, columns_first=columns_first),
        "cu_seqlens": cumulative(lengths), "slots": int32([2, 0, 3]), "starts": int32([5, 0, 21]),
        "zero_padding": zero_padding,
    }  # fmt: skip
    expected = twins(arguments)
    reference.insert_kv(**expected)
    check_written(ops, arguments, ("insert_kv", expected))


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rounding(ops, dtype, stored):
    """All values between neighboring numbers, and the ties, which go to the even number."""
    top = 127.0 if stored == torch.int8 else 448.0
    x = torch.cat((torch.linspace(-top, top, 8161), torch.arange(-2048, 2048) * 2.0**-11))
    x = torch.cat((x, torch.zeros(-len(x) % 31))).view(-1, 1, 31)
    x = torch.cat((x, torch.full_like(x[..., :1], top)), dim=-1).to(dtype)
    arguments = {"key": x, "value": -x, **caches(stored, slots=len(x), heads=1, dim=32, capacity=1)}
    expected = twins(arguments)
    reference.insert_kv(**expected)
    check_written(ops, arguments, ("insert_kv", expected))
    # The scale is exactly 1, so that the elements are the numbers as torch rounds them.
    elements = arguments["key_cache"][:, 0, 0].float()
    rounded = x[:, 0].float().round() if stored == torch.int8 else x[:, 0].to(stored).float()
    assert torch.equal(elements, rounded)
    assert (arguments["key_scale"] == 1.0).all()


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_numbers(ops, dtype, stored):
    """Zeros, numbers without a normal scale, NaN and infinities; only row 1 is all ordinary."""
    x = torch.ones(7, 1, 16)
    x[0] = 0.0
    x[1] = 1e-38
    for row, special in enumerate((math.nan, math.inf, -math.inf), start=2):
        x[row, 0, 5] = special
    x[5] = -0.0
    x = x.to(dtype)
    arguments = {"key": x, "value": x, **caches(stored, slots=7, heads=1, capacity=1)}
    expected = twins(arguments)
    reference.insert_kv(**expected)
    check_written(ops, arguments, ("insert_kv", expected))
    scales = arguments["key_scale"][:, 0, 0]
    assert scales[[0, 1, 5]].tolist() == [0.0] * 3 and scales[2:5].isnan().all()
    assert (arguments["key_cache"][[0, 1, 2, 3, 4, 5], 0, 0].float() == 0.0).all()
    assert scales[6] == torch.tensor(1.0) / (127 if stored == torch.int8 else 448)


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("query", [False, True])
@pytest.mark.parametrize("rotary", [None, "half", "full"])
def test_append(ops, rotary, query, dim, dtype, stored):
    """The key is rotated as for a float cache, then quantized as by insert_kv."""
    rows, generator = 13, torch.Generator().manual_seed(0)
    key, value = tokens(rows, dtype, dim=dim)
    places = {
        "slots": int32([i % 4 for i in range(rows)]), "columns": int32([3 * i for i in range(rows)])
    }  # fmt: skip
    options = {}
    if rotary:
        angle = torch.rand(rows, dim if rotary == "full" else dim // 2, generator=generator) * 6.3
        options = {"cos": angle.cos(), "sin": angle.sin()}
    if query:
        options["query"] = tokens(rows, dtype, heads=6, dim=dim)[0]
    arguments = {"key": key, "value": value, **caches(stored, dim=dim)}
    floats = [torch.zeros(4, 2, 50, dim, dtype=dtype) for _ in range(2)]
    rotated = ops.append_kv(key, value, *floats, **places, **options)
    at = places["slots"].long(), slice(None), places["columns"].long()
    expected = twins(arguments)
    for row in range(rows):
        reference.insert_kv(
            *(cache[at][row : row + 1] for cache in floats),
            *(expected[name] for name in NAMES[:2]),
            None, places["slots"][row : row + 1], places["columns"][row : row + 1],
            key_scale=expected["key_scale"], value_scale=expected["value_scale"],
        )  # fmt: skip
    result = ops.append_kv(**arguments, **places, **options)
    if query:
        assert_same_bits(result, rotated)
    else:
        assert result is None
    for name in NAMES:
        assert_same_bits(bits(arguments[name]), bits(expected[name]), name)


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize("layers", [(), (3,)])
def test_move(ops, layers, columns_first, stored):
    arguments = caches(stored, layers=layers, columns_first=columns_first)
    key, value = tokens(40, torch.float32, layers=layers)
    ops.insert_kv(key, value, **arguments, slots=int32([1]), starts=int32([2]),
                  cu_seqlens=int32([0, 40]))  # fmt: skip
    # Over itself to the right, and into another slot.
    for moves in ([1, 2, 1, 5, 37], [1, 9, 3, 0, 12], [1, 9, 1, 4, 30]):
        places = dict(zip(
            ("source_slots", "source_starts", "target_slots", "target_starts", "lengths"),
            (int32([x]) for x in moves), strict=True,
        ))  # fmt: skip
        expected = twins(arguments)
        reference.move_kv(**expected, **places)
        check_written(ops, arguments | places, ("move_kv", expected))


@pytest.mark.parametrize("stored", EIGHT_BITS)
@pytest.mark.parametrize("layers", [(), (3,)])
def test_extract(ops, layers, stored):
    arguments = caches(stored, layers=layers, dim=24)
    key, value = tokens(40, torch.float32, layers=layers, dim=24)
    rows = {"cu_seqlens": int32([0, 11, 40]), "slots": int32([3, 1]), "starts": int32([2, 20])}
    ops.insert_kv(key, value, **arguments, **rows)
    # Stored tokens: written into another cache they are the same.
    taken = ops.extract_kv(**arguments, **rows, total_tokens=40)
    assert taken[0].shape == (*layers, 40, 2, 28) and taken[0].dtype == stored
    for got, want in zip(
        taken, reference.extract_kv(**arguments, **rows, total_tokens=40), strict=True
    ):
        assert_same_bits(got.view(torch.int8), want.view(torch.int8))
    other = caches(stored, layers=layers, dim=24)
    ops.insert_kv(*taken, **other, **rows)
    for name in NAMES:
        assert_same_bits(bits(other[name]), bits(arguments[name]), name)
    # As floats.
    for dtype in DTYPES:
        floats = ops.extract_kv(**arguments, **rows, total_tokens=40, dtype=dtype)
        expected = reference.extract_kv(**arguments, **rows, total_tokens=40, dtype=dtype)
        out = tuple(torch.full_like(x, float("nan")) for x in floats)
        assert ops.extract_kv(**arguments, **rows, total_tokens=40, out=out) is out
        for got, also, want in zip(floats, out, expected, strict=True):
            assert got.dtype == dtype
            assert_same_bits(got, want)
            assert_same_bits(also, want)


def test_quantizing_errs_by_half_a_step():
    """An element differs from its number by at most half a step; the largest is exact."""
    key, _ = tokens(40, torch.float32)
    for stored in EIGHT_BITS:
        elements, scale = quantize(key, stored)
        error = (dequantize(elements, scale, torch.float32) - key).abs()
        top = key.abs().amax(-1, keepdim=True)
        if stored == torch.int8:
            assert (error <= top / 127 * 0.5001).all()
        else:
            assert (error <= (key.abs() * 2**-4).maximum(top / 448 * 2**-10) * 1.0001).all()


# 2. Bad arguments.


def spoiled(op):
    stored = caches(torch.int8, dim=16)
    key, value = tokens(5, torch.float32)
    places = {"slots": int32([0, 1, 2, 3, 0]), "columns": int32([0, 1, 2, 3, 4])}
    if op == "insert_kv":
        return {"key": key, "value": value, **stored, "slots": None, "starts": None,
                "cu_seqlens": int32([0, 2, 5]), "zero_padding": False}  # fmt: skip
    if op == "append_kv":
        return {"key": key, "value": value, **stored, **places, "cos": None, "sin": None}
    if op == "move_kv":
        names = ("source_slots", "source_starts", "target_slots", "target_starts")
        return {**stored, **dict.fromkeys(names, None), "lengths": int32([4]),
                "target_slots": int32([1])}  # fmt: skip
    # opcheck compares results, and NaN does not equal anything.
    for name in NAMES[2:]:
        stored[name].fill_(1.0)
    key, value = (torch.zeros(3, 2, 16) for _ in range(2))
    return {**stored, "cu_seqlens": None, "slots": None, "starts": None, "total_tokens": 3,
            "key": key, "value": value}  # fmt: skip


BAD = {
    "scales float16": Refusal("key_scale", TypeError, key_scale=torch.Tensor.half),
    "scales of another shape": Refusal("value_scale", ValueError, value_scale=lambda x: x[1:]),
    "scales expanded": Refusal(
        "key_scale", ValueError, key_scale=lambda x: x[:1].expand(4, -1, -1)
    ),
    "caches of floats": Refusal(
        "key_cache", TypeError, **dict.fromkeys(NAMES[:2], torch.Tensor.float)
    ),
    "another cache": Refusal("value_cache", TypeError, value_cache=torch.Tensor.float),
    "keys uint8": Refusal("key", TypeError, key=lambda x: x.to(torch.uint8)),
    "keys of another kind": Refusal("key", TypeError, key=lambda x: x.to(torch.float8_e4m3fn)),
    "values of another dtype": Refusal("value", TypeError, value=torch.Tensor.half),
    "keys as they are without scales": Refusal(
        "key", ValueError, **dict.fromkeys(("key", "value"), lambda x: x.to(torch.int8))
    ),
}


@pytest.mark.parametrize("route", ["python", "fake", "torch.ops"])
@pytest.mark.parametrize(
    ("op", "case"),
    [(op, case) for op in ("insert_kv", "append_kv") for case in BAD]
    # move_kv has no packed tokens.
    + [("move_kv", case) for case, bad in BAD.items() if not {"key", "value"} & bad.changes.keys()],
)
def test_bad_arguments(op, case, route):
    refusal = BAD[case]
    arguments = spoiled(op)
    if op == "append_kv" and case == "keys as they are without scales":
        refusal = Refusal("key", TypeError, **refusal.changes)
    refusal.check(op, arguments, route)


@pytest.mark.parametrize("op", ["insert_kv", "append_kv", "move_kv"])
def test_scales_are_given_together_or_not_at_all(op):
    for missing, error in (
        (("key_scale",), ValueError), (("value_scale",), ValueError),
        (("key_scale", "value_scale"), TypeError),
    ):  # fmt: skip
        arguments = {name: x for name, x in spoiled(op).items() if name not in missing}
        before = {name: bits(x).clone() for name, x in arguments.items() if name in NAMES}
        with pytest.raises(error, match=rf"{op}: key_scale and value_scale must be given"):
            getattr(baton_kernels, op)(**arguments)
        for name, x in before.items():
            assert_same_bits(bits(arguments[name]), x)


def test_bad_extracts():
    arguments = spoiled("extract_kv")
    key, value = arguments.pop("key"), arguments.pop("value")
    extract = baton_kernels.extract_kv
    for out, error, text in (
        ((key.half(), value), TypeError, r"out\[1\] must be float16 as out\[0\], got float32"),
        ((key[1:], value), ValueError, r"out\[0\] must be of shape \[3, 2, 16\]"),
        ((key.double(), value), TypeError, r"out\[0\] must be float32, float16 or bfloat16"),
        ((key.to(torch.int8),) * 2, ValueError, r"out\[0\] must be of shape \[3, 2, 20\]"),
        ((key.to(torch.float8_e4m3fn),) * 2, TypeError, r"out\[0\] must be int8 as key_cache"),
    ):
        with pytest.raises(error, match=f"extract_kv: {text}"):
            extract(**arguments, out=out)
    with pytest.raises(TypeError, match="extract_kv: dtype must be float32, float16 or bfloat16"):
        extract(**arguments, dtype=torch.int32)
    floats = {name: arguments[name].float() for name in NAMES[:2]}
    with pytest.raises(TypeError, match="extract_kv: dtype must be None with a cache of floats"):
        extract(**floats, total_tokens=3, dtype=torch.float32)


# 3. torch.


@pytest.mark.parametrize("op, overload", [
    ("insert_kv", "scaled"), ("append_kv", "scaled"), ("append_kv", "scaled_query"),
    ("move_kv", "scaled"), ("extract_kv", "scaled"), ("extract_kv", "scaled_out"),
])  # fmt: skip
def test_opcheck(op, overload):
    arguments = spoiled(op)
    if overload == "scaled_query":
        arguments["query"] = tokens(5, torch.float32, heads=4)[0]
    if (op, overload) == ("extract_kv", "scaled"):
        arguments = {name: x for name, x in arguments.items() if name not in ("key", "value")}
        arguments["dtype"] = torch.float16
    torch.library.opcheck(getattr(getattr(torch.ops.baton_kernels, op), overload), (), arguments)


def test_compiles():
    def step(key, value, cached):
        baton_kernels.append_kv(key, value, **cached, columns=int32([1, 2, 3, 4, 5]),
                                slots=int32([0, 0, 0, 0, 0]))  # fmt: skip
        return baton_kernels.extract_kv(
            **cached, starts=int32([1]), cu_seqlens=int32([0, 5]), total_tokens=5,
            dtype=torch.float32,
        )[0]  # fmt: skip

    key, value = tokens(5, torch.float32)
    expected = step(key, value, caches(torch.int8))
    compiled = torch.compile(step, fullgraph=True)
    assert_same_bits(compiled(key, value, caches(torch.int8)), expected)
