"""Left-out index arguments, and results written into the caller's tensors, give the same bits as
calls with all arguments, on every backend."""

import itertools

import pytest
import torch

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import (
    DTYPES,
    Refusal,
    assert_same_bits,
    int32,
    nan_in_empty,
    storage,
    twin,
)

# The fixture `ops` has this op's backends here, which include the emulated CUDA kernels.
BACKENDS_OF = "insert_kv"

ROWS, CAPACITY, KV_HEADS, HEAD_DIM = 5, 9, 2, 16
ASCENDING = list(range(ROWS))
ZEROS = [0] * ROWS
# Op -> its index arguments and their defaults.
DEFAULTS = {
    "insert_kv": {"cu_seqlens": [*ASCENDING, ROWS], "slots": ASCENDING, "starts": ZEROS},
    "extract_kv": {"cu_seqlens": [*ASCENDING, ROWS], "slots": ASCENDING, "starts": ZEROS},
    "append_kv": {"slots": ASCENDING},
    "move_kv": {
        "source_slots": ASCENDING,
        "source_starts": ZEROS,
        "target_slots": ASCENDING,
        "target_starts": ZEROS,
    },
    "ragged_attention": {"cu_seqlens_q": [*ASCENDING, ROWS], "slots": ASCENDING, "starts": ZEROS},
    "attention_mask": {"starts": ZEROS},
    "masked_softmax": {"starts": ZEROS},
}
CASES = [
    (op, left_out)
    for op, names in DEFAULTS.items()
    for count in range(1, len(names) + 1)
    for left_out in itertools.combinations(names, count)
]


def arguments(op, dtype=torch.float32):
    """Arguments of a call in which every index argument has its default value."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    caches = {
        name: random(ROWS + 1, KV_HEADS, CAPACITY, HEAD_DIM)
        for name in ("key_cache", "value_cache")
    }
    packed = {name: random(ROWS, KV_HEADS, HEAD_DIM) for name in ("key", "value")}
    lengths = int32([1, 4, 0, CAPACITY, 2])
    own = {
        "insert_kv": lambda: packed | caches,
        "extract_kv": lambda: caches | {"total_tokens": ROWS},
        "append_kv": lambda: packed | caches | {"columns": lengths.clamp(max=CAPACITY - 1)},
        "move_kv": lambda: caches | {"lengths": lengths},
        "ragged_attention": lambda: (
            caches | {"query": random(ROWS, 2 * KV_HEADS, HEAD_DIM), "lengths": lengths}
        ),
        "attention_mask": lambda: {"lengths": lengths, "query_length": 2, "key_length": CAPACITY},
        "masked_softmax": lambda: {"scores": random(ROWS, 2, 3, CAPACITY), "lengths": lengths},
    }
    return own[op]() | {name: int32(values) for name, values in DEFAULTS[op].items()}


def call(ops, op, given):
    """Results, and the call's tensors afterwards."""
    given = {name: twin(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    with nan_in_empty():
        result = getattr(ops, op)(**given)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    return results, {name: x for name, x in given.items() if isinstance(x, torch.Tensor)}


def without(op, given, left_out):
    """The arguments without some: starts of attention_mask becomes None, the others are omitted."""
    rest = {name: value for name, value in given.items() if name not in left_out}
    return rest | ({"starts": None} if op == "attention_mask" and "starts" in left_out else {})


@pytest.mark.parametrize(("op", "left_out"), CASES)
def test_the_same_bits(ops, op, left_out):
    if not hasattr(ops, op):
        pytest.skip(f"needs a backend with {op}: it has no CUDA kernel to emulate")
    for dtype in DTYPES:
        given = arguments(op, dtype)
        starts = [name for name in ("source_starts", "target_starts") if name not in left_out]
        if op == "move_kv" and starts:
            # With all defaults nothing would move.
            given[starts[0]] = int32([0, 3, 5, 0, 6])
        expected, before = call(ops, op, given)
        actual, after = call(ops, op, without(op, given, left_out))
        for got, want in zip(actual, expected, strict=True):
            assert_same_bits(got, want)
        for name, tensor in after.items():
            assert_same_bits(storage(tensor), storage(before[name]), name)


@pytest.mark.parametrize(("op", "left_out"), CASES)
def test_the_reference_has_the_same_defaults(op, left_out):
    expected, before = call(reference, op, arguments(op))
    actual, after = call(reference, op, without(op, arguments(op), left_out))
    for got, want in zip(actual, expected, strict=True):
        assert_same_bits(got, want)
    for name, tensor in after.items():
        assert_same_bits(storage(tensor), storage(before[name]), name)


@pytest.mark.parametrize("rows", [0, 1, 200])
def test_numbers_of_rows(ops, rows):
    """More rows than the threads of a block, and none."""
    key, value = torch.randn(2, rows, 1, 16)
    caches = torch.zeros(2, rows + 1, 1, 3, 16)
    ops.insert_kv(key, value, *caches)
    assert torch.equal(caches[0, :rows, 0, 0], key[:, 0])
    assert torch.equal(caches[1, :rows, 0, 0], value[:, 0])
    assert caches[:, :, :, 1:].eq(0).all() and caches[:, rows].eq(0).all()


@pytest.mark.parametrize("op", DEFAULTS)
def test_opcheck(op):
    given = arguments(op)
    overload = {"append_kv": "default", "ragged_attention": "options"}.get(op, "default")
    call = getattr(getattr(torch.ops.baton_kernels, op), overload)
    names = [argument.name for argument in call._schema.arguments]
    args = [None if name in DEFAULTS[op] else given[name] for name in names if name in given]
    torch.library.opcheck(call, tuple(args))


@pytest.mark.parametrize("op", DEFAULTS)
def test_compile(op, fresh_compiler):
    function = getattr(baton_kernels, op)

    @torch.compile(fullgraph=True)
    def compiled(**given):
        return function(**given)

    given = without(op, arguments(op), DEFAULTS[op])
    expected, before = call(baton_kernels, op, given)
    result = compiled(**given)
    results = result if isinstance(result, tuple) else () if result is None else (result,)
    for got, want in zip(results, expected, strict=True):
        assert_same_bits(got, want)
    for name, tensor in before.items():
        assert_same_bits(given[name], tensor, name)


# With several tokens per row, the call must say where each row begins.
SEVERAL = {
    "insert_kv": ("cu_seqlens", {"cu_seqlens": None, "slots": int32([0, 1])}),
    "extract_kv": ("cu_seqlens", {"cu_seqlens": None, "starts": int32([0, 1])}),
    "ragged_attention": ("cu_seqlens_q", {"cu_seqlens_q": None, "lengths": int32([1, 2])}),
}


@pytest.mark.parametrize("route", ["python", "fake", "torch.ops"])
@pytest.mark.parametrize("op", SEVERAL)
def test_several_tokens_need_their_boundaries(op, route):
    argument, changes = SEVERAL[op]
    given = {name: x for name, x in arguments(op).items() if name not in DEFAULTS[op]}
    given |= dict.fromkeys(DEFAULTS[op])
    Refusal(argument, ValueError, **changes).check(op, given, route)


@pytest.mark.parametrize("route", ["python", "fake"])
@pytest.mark.parametrize(
    ("op", "argument"),
    [
        ("append_kv", "columns"),
        ("move_kv", "lengths"),
        ("ragged_attention", "lengths"),
        ("masked_softmax", "lengths"),
    ],
)
def test_what_has_no_default_is_named(op, argument, route):
    Refusal(argument, TypeError, **{argument: None}).check(op, arguments(op), route)


# out= of ragged_attention.


def buffers(query):
    """out and lse in the middle of larger memory, which nothing else may change."""
    return tuple(
        torch.full((len(query) + 2, *shape), float("nan"), dtype=dtype)[1:-1]
        for shape, dtype in ((query.shape[1:], query.dtype), (query.shape[1:2], torch.float32))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(ops, dtype):
    given = arguments("ragged_attention", dtype)
    (out, lse), _ = call(ops, "ragged_attention", given | {"return_lse": True})
    pair = buffers(given["query"])
    for options, results, expected in (
        ({"out": pair[0]}, pair[:1], (out,)),
        ({"out": pair[0], "softcap": 3.0}, pair[:1], None),
        ({"out": pair, "return_lse": True}, pair, (out, lse)),
    ):
        if expected is None:
            expected, _ = call(ops, "ragged_attention", given | {"softcap": 3.0})
        for result in results:
            storage(result).fill_(float("nan"))
        returned = ops.ragged_attention(**given, **options)
        for result, want in zip(results, expected, strict=True):
            assert_same_bits(result, want)
            whole = storage(result)
            margin = result[0].numel()
            assert whole[:margin].isnan().all() and whole[-margin:].isnan().all()
        if ops is baton_kernels:
            assert returned is options["out"]


def test_out_of_no_queries(ops):
    given = arguments("ragged_attention")
    given["query"], given["lengths"] = given["query"][:0], int32([])
    given |= {"slots": None, "starts": None, "cu_seqlens_q": None}
    pair = torch.empty_like(given["query"]), torch.empty(0, 2 * KV_HEADS)
    ops.ragged_attention(**given, return_lse=True, out=pair)


@pytest.mark.parametrize("overload", ["out", "lse_out"])
def test_opcheck_out(overload):
    given = arguments("ragged_attention")
    out, lse = buffers(given["query"])
    results = {"out": out} if overload == "out" else {"out": out, "lse": lse}
    call = getattr(torch.ops.baton_kernels.ragged_attention, overload)
    names = [argument.name for argument in call._schema.arguments if argument.name in given]
    torch.library.opcheck(call, tuple(given[name] for name in names), results)


@pytest.mark.parametrize("return_lse", [False, True])
def test_compile_out(return_lse, fresh_compiler):
    @torch.compile(fullgraph=True)
    def compiled(out, **given):
        baton_kernels.ragged_attention(**given, return_lse=return_lse, out=out)

    given = arguments("ragged_attention")
    (out, lse), _ = call(baton_kernels, "ragged_attention", given | {"return_lse": True})
    pair = buffers(given["query"])
    compiled(pair if return_lse else pair[0], **given)
    assert_same_bits(pair[0], out)
    assert pair[1].isnan().all() if not return_lse else torch.equal(pair[1], lse)


BAD_OUT = {
    "too short": (ValueError, "out must be of shape", lambda q: torch.empty_like(q)[1:]),
    "of another dtype": (TypeError, "out must be float32 as query", torch.Tensor.half),
    "strided": (
        ValueError,
        "out must be contiguous",
        lambda q: torch.empty(*q.shape, 2)[..., 0],
    ),
    "elsewhere": (ValueError, "out must be on the cpu", lambda q: q.to("meta")),
    "the query": (ValueError, "out must be in memory apart from query's", lambda q: q),
    "no tensor": (TypeError, "out must be a tensor, got int", lambda q: 3),
}


@pytest.mark.parametrize("name", BAD_OUT)
def test_bad_out(name):
    error, message, make = BAD_OUT[name]
    given = arguments("ragged_attention")
    before = twin(given["query"])
    with pytest.raises(error, match=f"ragged_attention: {message}"):
        baton_kernels.ragged_attention(**given, out=make(given["query"]))
    assert_same_bits(given["query"], before)


def test_bad_pairs():
    given = arguments("ragged_attention")
    out, lse = buffers(given["query"])
    for pair in (out, (out,), (out, lse, lse)):
        with pytest.raises(TypeError, match="out must be a pair of tensors with return_lse"):
            baton_kernels.ragged_attention(**given, return_lse=True, out=pair)
    with pytest.raises(TypeError, match="out must be a tensor, got tuple"):
        baton_kernels.ragged_attention(**given, out=(out, lse))
    with pytest.raises(ValueError, match="lse must be of shape"):
        baton_kernels.ragged_attention(**given, return_lse=True, out=(out, lse[1:]))
    with pytest.raises(TypeError, match="lse must be float32"):
        baton_kernels.ragged_attention(**given, return_lse=True, out=(out, lse.double()))
    whole = torch.empty(out.numel() + lse.numel())
    overlapping = whole[: out.numel()].view(out.shape), whole[: lse.numel()].view(lse.shape)
    with pytest.raises(ValueError, match="lse must be in memory apart from out's"):
        baton_kernels.ragged_attention(**given, return_lse=True, out=overlapping)
