import functools
import math

import pytest
import torch
from judged import judged

import baton_kernels
from baton_kernels.testing import (
    DTYPES,
    Accuracy,
    Refusal,
    assert_same_bits,
    attention_problem,
    before_a_hole,
    cpu_threads,
    embed,
    int32,
    nan_in_empty,
    random_attention_problem,
    random_rows,
    storage,
    twin,
)


def slopes(num_heads):
    return 2.0 ** -torch.arange(1.0, num_heads + 1)


def check(ops, problem, accuracy=None, **options):
    """Accurate, contiguous, and no argument is written."""
    before = [twin(x) for x in problem.args]
    with nan_in_empty():
        actual = ops.ragged_attention(*problem.args, **options)
    accuracy = accuracy or Accuracy("ragged_attention", *before, **options)
    accuracy.check(actual)
    for got, want in zip(problem.args, before, strict=True):
        assert_same_bits(storage(got), storage(want))
    out = actual[0] if isinstance(actual, tuple) else actual
    assert out.is_contiguous()
    return actual


# 1. The reference.

EVERYTHING = {"window": 40, "softcap": 15.0, "scale": 0.3, "return_lse": True}
# Query lengths, lengths, (num_heads, num_kv_heads), head_dim, options ("alibi", "sinks": flags).
CASES = {
    "decode": ([1, 1, 1, 1], [1, 63, 128, 1000], (4, 2), 64, {"return_lse": True}),
    "prefill": ([1, 63, 128], [1, 63, 128], (4, 2), 64, {"return_lse": True}),
    "long prefill": ([300], [1000], (2, 1), 64, {}),
    "long row": ([64], [2000], (4, 1), 64, {"return_lse": True}),
    # If no key stands out, the sum over the values is as long as the row.
    "long row, flat": ([64], [2000], (4, 1), 64, {"scale": 0.01}),
    "mixture": ([1, 17, 0, 40, 1], [700, 90, 30, 40, 3], (4, 4), 32, {"return_lse": True}),
    "several tokens": ([2, 4, 3], [513, 1025, 511], (8, 2), 64, {}),
    "mqa": ([1, 5, 33], [600, 70, 33], (8, 1), 128, {}),
    "thirds": ([1, 5, 33], [600, 70, 33], (9, 3), 64, {"return_lse": True}),
    "large group": ([1, 5], [600, 70], (40, 1), 16, {}),
    "head_dim 16": ([1, 9], [130, 31], (4, 2), 16, {}),
    "head_dim 24": ([1, 9], [130, 31], (4, 2), 24, {"softcap": 5.0}),
    "head_dim 80": ([1, 9], [530, 31], (4, 2), 80, {"window": 7}),
    "head_dim 96": ([1, 9], [130, 31], (4, 2), 96, {"alibi": True}),
    "head_dim 128": ([1, 9], [530, 31], (4, 2), 128, {"sinks": True}),
    "head_dim 256": ([1, 9], [530, 31], (4, 2), 256, {"scale": 0.02}),
    "window 1": ([1, 9, 63], [530, 31, 63], (4, 2), 64, {"window": 1}),
    "window": ([1, 9, 63], [1000, 131, 63], (4, 2), 64, {"window": 20, "return_lse": True}),
    "window past all": ([1, 9], [530, 31], (4, 2), 64, {"window": 2**31 - 1}),
    "both ways": ([1, 9, 63], [530, 31, 63], (4, 2), 64, {"causal": False, "return_lse": True}),
    "both ways in a window": ([9, 63], [31, 63], (4, 2), 64, {"causal": False, "window": 5}),
    "softcap": ([1, 9], [530, 31], (4, 2), 64, {"softcap": 2.0, "return_lse": True}),
    "alibi": ([1, 40], [1000, 131], (8, 2), 64, {"alibi": True, "return_lse": True}),
    "sinks": ([1, 40, 3], [1000, 131, 3], (4, 2), 64, {"sinks": True, "return_lse": True}),
    "everything": ([1, 9, 63], [1000, 31, 63], (4, 2), 80, {**EVERYTHING, "sinks": True}),
    "everything and alibi": (
        [1, 9, 63],
        [1000, 131, 63],
        (9, 3),
        64,
        {**EVERYTHING, "sinks": True, "alibi": True},
    ),
}


def case(name, dtype=torch.float32, **placement):
    query_lengths, lengths, (num_heads, num_kv_heads), head_dim, options = CASES[name]
    problem = random_attention_problem(
        query_lengths, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=dtype, **placement,
    )  # fmt: skip
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = slopes(num_heads)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 3.0, num_heads)
    return problem, options


@functools.cache
def accuracy_of(name, dtype):
    """The reference takes most of a test's time, and is the same for every backend."""
    problem, options = case(name, dtype)
    return Accuracy("ragged_attention", *problem.args, **options)


# The scale does not affect memory accesses.
@pytest.mark.full(where=judged(lambda name: name == "long row, flat"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_matches_reference(ops, name, dtype):
    problem, options = case(name, dtype)
    check(ops, problem, accuracy_of(name, dtype), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("columns_first", "margins"), [(True, None), (False, (1, 1, 2, 3)), (True, (0, 0, 0, 0))]
)
def test_layouts(ops, columns_first, margins, dtype):
    problem, options = case("mixture", dtype, columns_first=columns_first, margins=margins)
    check(ops, problem, accuracy_of("mixture", dtype), **options)


def test_caches_of_different_strides(ops):
    problem, options = case("mixture", columns_first=True)
    problem.key_cache = problem.key_cache.contiguous()
    check(ops, problem, accuracy_of("mixture", torch.float32), **options)


def test_large_scores(ops):
    """The softmax subtracts its maximum: scores of thousands neither overflow nor lose the rest."""
    problem, options = case("decode", torch.float16)
    check(ops, problem, **options, scale=100.0)


# 2. Edges.


@pytest.mark.parametrize("return_lse", [False, True])
def test_no_rows(ops, return_lse):
    problem = random_attention_problem([1], [4])
    empty = [int32([0]), int32([]), int32([]), int32([])]
    actual = ops.ragged_attention(
        problem.query[:0], *problem.args[1:3], *empty, return_lse=return_lse
    )
    out, lse = actual if return_lse else (actual, None)
    assert out.shape == (0, 4, 64)
    assert lse is None or lse.shape == (0, 4)


def test_rows_without_query_tokens(ops):
    check(ops, random_attention_problem([0, 0], [5, 0]), return_lse=True)


@pytest.mark.parametrize("causal", [True, False])
def test_more_query_tokens_than_tokens(ops, causal):
    """Positions below zero see nothing."""
    problem = random_attention_problem([3, 40, 2, 1], [1, 30, 0, 0])
    out, lse = check(ops, problem, return_lse=True, causal=causal)
    blind = torch.tensor([True] * 2 + [False] + [True] * 10 + [False] * 30 + [True] * 3)
    assert_same_bits(out[blind], torch.zeros_like(out[blind]))
    assert (lse[blind] == -math.inf).all() and lse[~blind].isfinite().all()

    sinks = torch.tensor([0.0, 1.0, -2.0, 3.5])
    out, lse = check(ops, problem, return_lse=True, causal=causal, sinks=sinks)
    assert_same_bits(out[blind], torch.zeros_like(out[blind]))
    assert_same_bits(lse[blind], sinks.expand(15, 4))


def test_sinks_of_minus_infinity_are_no_sinks(ops):
    """Also where a query sees nothing, and in rows that are split."""
    problem = random_attention_problem([1, 5, 3], [1200, 30, 1])
    sinks = torch.full((4,), -math.inf)
    for got, want in zip(
        ops.ragged_attention(*problem.args, sinks=sinks, return_lse=True),
        ops.ragged_attention(*problem.args, return_lse=True),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_rows_share_a_slot(ops):
    problem = random_attention_problem([3, 2], [40, 9], slots=[1, 1], starts=[2, 42], capacity=60)
    problem.lengths = int32([49, 20])
    problem.starts = int32([2, 10])
    check(ops, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_splits_than_allowed(ops, dtype):
    problem = random_attention_problem(
        [1, 1], [40000, 33000], num_heads=2, num_kv_heads=1, head_dim=16, dtype=dtype
    )
    check(ops, problem, return_lse=True)


@pytest.mark.parametrize("name", ["mixture", "everything and alibi"])
def test_optionals_that_change_nothing(ops, name):
    problem, options = case(name)
    options["return_lse"] = True
    out, lse = ops.ragged_attention(*problem.args, **options)
    for spare in (
        {"max_query_length": 63, "max_length": 1000},
        {"max_query_length": 10**6, "max_length": 10**6},
    ):
        same, same_lse = ops.ragged_attention(*problem.args, **options, **spare)
        assert_same_bits(same, out)
        assert_same_bits(same_lse, lse)
    assert_same_bits(ops.ragged_attention(*problem.args, **options | {"return_lse": False}), out)


# 3. Poison and batch invariance.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["mixture", "everything", "both ways", "head_dim 24"])
def test_padding_is_not_read(ops, name, dtype):
    problem, options = case(name, dtype)
    options["return_lse"] = True
    clean = problem.with_padding(0.0)
    for got, want in zip(
        ops.ragged_attention(*problem.args, **options),
        ops.ragged_attention(*clean.args, **options),
        strict=True,
    ):
        assert not got.isnan().any()
        assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "length", "head_dim", "columns_first"),
    [(1, 77, 64, False), (1, 515, 24, True), (20, 33, 80, False), (70, 129, 128, True)],
)
def test_nothing_is_loaded_from_behind_the_arguments(
    ops, tokens, length, head_dim, columns_first, dtype
):
    problem = random_attention_problem(
        [tokens], [length], head_dim=head_dim, dtype=dtype,
        capacity=length, num_slots=1, margins=(0, 0, 0, 0), columns_first=columns_first,
    )  # fmt: skip
    expected = ops.ragged_attention(*problem.args)
    for name in ("query", "key_cache", "value_cache"):
        setattr(problem, name, before_a_hole(getattr(problem, name)))
    assert_same_bits(ops.ragged_attention(*problem.args), expected)


# The other rows' accesses are judged above; bits are those of cuda-emulated (test_emulation.py).
@pytest.mark.full(where=judged(lambda name: name != "mixture"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["decode", "mixture", "thirds", "everything and alibi"])
def test_batch_invariance(ops, name, dtype):
    query_lengths, lengths, (num_heads, num_kv_heads), head_dim, _ = CASES[name]
    options = {**case(name)[1], "return_lse": True}
    # Prefills and decodes in addition to the rows of the case.
    rows = random_rows(
        [*query_lengths, 70, 1],
        [*lengths, 80, 1500],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    batch = attention_problem(rows)
    with cpu_threads(1):
        expected = [batch.split(x) for x in ops.ragged_attention(*batch.args, **options)]
    everyone = list(range(len(rows)))
    batches = [(everyone, 2, {}), (everyone[::-1], 2, {"columns_first": True})]
    batches += [(everyone[:-2], 2, {"capacity": 1100}), (everyone[1::2], 1, {"num_slots": 30})]
    batches += [([i], 1 + i % 2, {"capacity": 1600 + i, "num_slots": 3}) for i in everyone]
    for seed, (members, threads, placement) in enumerate(batches):
        other = attention_problem([rows[i] for i in members], seed=seed, **placement)
        with cpu_threads(threads):
            actual = [other.split(x) for x in ops.ragged_attention(*other.args, **options)]
        for got, want, what in zip(actual, expected, ("out", "lse"), strict=True):
            for place, i in enumerate(members):
                assert_same_bits(got[place], want[i], f"{what} of row {i} in batch {members}")


# 4. Bad arguments.


def arguments_to_spoil():
    problem = random_attention_problem(
        [2, 1], [3, 5], head_dim=16, num_slots=4, capacity=8, slots=[1, 3], starts=[0, 2]
    )
    return dict(vars(problem))


CACHES = ("key_cache", "value_cache")
PACKED = ("query", *CACHES)
BAD = {
    "query without heads": Refusal("query", ValueError, query=lambda x: x[:, 0]),
    "query of other head_dim": Refusal("query", ValueError, query=lambda x: x[..., :8]),
    "query of other dtype": Refusal("query|key_cache", TypeError, query=torch.Tensor.half),
    "query strided in head_dim": Refusal(
        "query", ValueError, query=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "heads no multiple of KV heads": Refusal(
        "query|num_heads", ValueError, query=lambda x: x[:, :3]
    ),
    "key_cache with layers": Refusal("key_cache", ValueError, key_cache=lambda x: x[None]),
    "value_cache of other shape": Refusal("value_cache", ValueError, value_cache=lambda x: x[1:]),
    "value_cache of other dtype": Refusal("value_cache", TypeError, value_cache=torch.Tensor.half),
    "value_cache strided in head_dim": Refusal(
        "value_cache", ValueError, value_cache=lambda x: x.repeat_interleave(2, -1)[..., ::2]
    ),
    "double": Refusal("query|key_cache", TypeError, **dict.fromkeys(PACKED, torch.Tensor.double)),
    "head_dim 20": Refusal(
        "head_dim|query|key_cache",
        NotImplementedError,
        **dict.fromkeys(PACKED, lambda x: torch.cat((x, x[..., :4]), -1)),
    ),
    "cu_seqlens_q int64": Refusal("cu_seqlens_q", TypeError, cu_seqlens_q=torch.Tensor.long),
    "lengths int64": Refusal("lengths", TypeError, lengths=torch.Tensor.long),
    "slots of two dimensions": Refusal("slots", ValueError, slots=lambda x: x[None]),
    "a slot too few": Refusal("slots|starts|cu_seqlens_q", ValueError, slots=lambda x: x[:1]),
    "a start too few": Refusal("starts", ValueError, starts=lambda x: x[:1]),
    "a length too many": Refusal("lengths", ValueError, lengths=int32([1, 1, 1])),
    "window 0": Refusal("window", ValueError, window=0),
    "window below zero": Refusal("window", ValueError, window=-3),
    "softcap below zero": Refusal("softcap", ValueError, softcap=-1.0),
    "scale infinite": Refusal("scale", ValueError, scale=math.inf),
    "softcap infinite": Refusal("softcap", ValueError, softcap=math.inf),
    "max_query_length below zero": Refusal("max_query_length", ValueError, max_query_length=-1),
    "max_length below zero": Refusal("max_length", ValueError, max_length=-1),
    "slots elsewhere": Refusal("slots", ValueError, slots=lambda x: x.to("meta")),
    "sinks elsewhere": Refusal("sinks", ValueError, sinks=torch.ones(4, device="meta")),
    "alibi_slopes half": Refusal("alibi_slopes", TypeError, alibi_slopes=torch.ones(4).half()),
    "alibi_slopes of other heads": Refusal("alibi_slopes", ValueError, alibi_slopes=torch.ones(2)),
    "alibi_slopes per row": Refusal("alibi_slopes", ValueError, alibi_slopes=torch.ones(2, 4)),
    "sinks double": Refusal("sinks", TypeError, sinks=torch.ones(4).double()),
    "sinks of other heads": Refusal("sinks", ValueError, sinks=torch.ones(5)),
    "cu_seqlens_q from 1": Refusal(
        "cu_seqlens_q.*", ValueError, values=True, cu_seqlens_q=int32([1, 2, 3])
    ),
    "cu_seqlens_q falling": Refusal(
        "cu_seqlens_q.*", ValueError, values=True, cu_seqlens_q=int32([0, 4, 3])
    ),
    "cu_seqlens_q short of the end": Refusal(
        "cu_seqlens_q.*", ValueError, values=True, cu_seqlens_q=int32([0, 1, 2])
    ),
    "slot past the end": Refusal("slots.*", ValueError, values=True, slots=int32([1, 4])),
    "slot below zero": Refusal("slots.*", ValueError, values=True, slots=int32([-1, 3])),
    "start below zero": Refusal("starts.*", ValueError, values=True, starts=int32([-1, 2])),
    "length below zero": Refusal("lengths.*", ValueError, values=True, lengths=int32([3, -1])),
    "end past capacity": Refusal(
        "(starts|lengths).*", ValueError, values=True, lengths=int32([3, 7])
    ),
    "end past 2**31": Refusal(
        "(starts|lengths).*", ValueError, values=True, lengths=int32([3, 2**31 - 1])
    ),
    "max_query_length too low": Refusal(
        "(max_query_length|cu_seqlens_q).*", ValueError, values=True, max_query_length=1
    ),
    "max_length too low": Refusal("(max_length|lengths).*", ValueError, values=True, max_length=4),
}


@pytest.mark.parametrize(
    ("name", "route"), [(name, route) for name, bad in BAD.items() for route in bad.routes]
)
def test_bad_arguments(name, route):
    # torch.ops takes no return_lse: it has an overload.
    for options in ({}, {"return_lse": True})[: 1 if route == "torch.ops" else 2]:
        BAD[name].check("ragged_attention", arguments_to_spoil() | options, route)


# 5. torch.compile.


@pytest.mark.parametrize("overload", ["default", "options", "lse"])
@pytest.mark.parametrize("name", ["mixture", "everything and alibi"])
def test_opcheck(name, overload):
    problem, options = case(name)
    del options["return_lse"]
    args = problem.with_padding(0.0).args
    op = getattr(torch.ops.baton_kernels.ragged_attention, overload)
    torch.library.opcheck(op, args, {} if overload == "default" else options)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("return_lse", [False, True])
def test_compile(return_lse):
    class Compiled:
        ragged_attention = staticmethod(
            torch.compile(baton_kernels.ragged_attention, fullgraph=True, backend="aot_eager")
        )

    for lengths in ([3, 5], [8, 20]):
        check(Compiled, random_attention_problem([2, 1], lengths), return_lse=return_lse)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_a_decode_step():
    """The mutation of append_kv stays before the attention that reads it."""

    def step(key, value, query, problem, columns, cos, sin):
        caches = problem["key_cache"], problem["value_cache"]
        rotated = baton_kernels.append_kv(
            key, value, *caches, problem["slots"], columns, query=query, cos=cos, sin=sin
        )
        return baton_kernels.ragged_attention(**problem | {"query": rotated})

    problem = random_attention_problem([1, 1], [30, 7]).with_padding(0.0)
    columns = problem.starts + problem.lengths - 1
    key, value = embed(torch.randn(2, 2, 64)), embed(torch.randn(2, 2, 64))
    angle = torch.rand(2, 32)
    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="inductor")):
        arguments = {name: twin(x) for name, x in vars(problem).items()}
        query = arguments["query"]
        out = run(key, value, query, arguments, columns, angle.cos(), angle.sin())
        results.append((out, arguments["key_cache"], arguments["value_cache"]))
    for eager, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, eager)


# 6. By hand.


def test_by_hand(ops):
    # Scores 0 and ln 3 (the others are padding): weights 1/4 and 3/4 of the values 8 and 4.
    key_cache = torch.full((1, 1, 4, 16), math.nan)
    value_cache = key_cache.clone()
    key_cache[0, 0, 1:3] = 0.0
    key_cache[0, 0, 2, 0] = 1.0
    value_cache[0, 0, 1], value_cache[0, 0, 2] = 8.0, 4.0
    query = torch.zeros(2, 1, 16)
    query[:, 0, 0] = math.log(3.0)
    shape = int32([0, 2]), int32([0]), int32([1]), int32([2])
    out, lse = ops.ragged_attention(
        query, key_cache, value_cache, *shape, scale=1.0, return_lse=True
    )
    torch.testing.assert_close(out[:, 0, 3], torch.tensor([8.0, 5.0]))
    torch.testing.assert_close(lse[:, 0], torch.tensor([0.0, math.log(4.0)]))
    # The sink's weight is 4, the others are 1 and 3: half of everything goes nowhere.
    sinks = torch.tensor([math.log(4.0)])
    out, lse = ops.ragged_attention(
        query, key_cache, value_cache, *shape, scale=1.0, sinks=sinks, return_lse=True
    )
    torch.testing.assert_close(out[:, 0, 3], torch.tensor([8.0 / 5, 2.5]))
    torch.testing.assert_close(lse[:, 0], torch.tensor([math.log(5.0), math.log(8.0)]))
    # ALiBi subtracts ln 3 from the score of the token before: weights 1/3 and 3.
    out = ops.ragged_attention(
        query, key_cache, value_cache, *shape, scale=1.0, alibi_slopes=torch.tensor([math.log(3.0)])
    )
    torch.testing.assert_close(out[:, 0, 3], torch.tensor([8.0, 4.4]))
