"""The Triton kernels behind torch.library: opcheck, torch.compile, index values out of range.

They are registered here for the CPU under another name, with the schemas and fakes of the ops, and
run in Triton's interpreter: tests/triton/test_triton_interpreter.py starts this file with it.
"""

import importlib
import importlib.util
import pathlib

import pytest
import torch
import triton
from op_tables import schemas

import baton_kernels
from baton_kernels.testing import (
    assert_same_bits,
    embed,
    int32,
    random_attention_problem,
    storage,
    twin,
)

if not triton.knobs.runtime.interpret:
    pytest.skip(
        "needs TRITON_INTERPRET=1: test_triton_interpreter.py runs this file with it",
        allow_module_level=True,
    )

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "ops"
OVERLOADS = [
    (op, overload) for op in baton_kernels.triton.OPS for overload in schemas(op)
    # Eight-bit caches, for which only the CPU has kernels.
    if not overload.startswith("scaled")
]  # fmt: skip


@pytest.fixture(scope="module")
def triton_ops():
    """torch.ops.baton_triton: the ops, with the functions for GPUs registered for the CPU."""
    library = torch.library.Library("baton_triton", "DEF")
    for op, overload in OVERLOADS:
        schema = str(schemas(op)[overload]).split("::")[1]
        library.define(schema)
        name, suffix = schema.split("(")[0], "" if overload == "default" else f"_{overload}"
        kernels = importlib.import_module(f"baton_kernels.triton.{op}")
        library.impl(name, getattr(kernels, f"run{suffix}"), "CPU")
        fakes = importlib.import_module(f"baton_kernels.ops.{op}")
        fake = getattr(fakes, f"_fake{suffix}")
        torch.library.register_fake(f"baton_triton::{name}", fake, lib=library)
    yield torch.ops.baton_triton
    library._destroy()


def valid_arguments(op):
    """Arguments by name, from the op's own tests; finite, because opcheck compares by value."""
    spec = importlib.util.spec_from_file_location(f"table_{op}", FOLDER / f"test_{op}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    special = {
        "likeliest": lambda: {"logits": module.problem(3, 8)},
        "linear": lambda: module.problem(3, 8, 4, bias=True),
        "merge_attention": lambda: module.problem(3),
        "rms_norm": lambda: module.problem(3, 8, residual=True),
        "silu_and_mul": lambda: {"x": module.problem(3, 4)},
    }
    arguments = (special.get(op) or module.arguments_to_spoil)()
    for x in arguments.values():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            storage(x).nan_to_num_(0.0, 0.0, 0.0)
    return arguments


def by_position(op, overload, arguments):
    """The arguments that the overload takes, in its order."""
    names = [argument.name for argument in schemas(op)[overload].arguments]
    return tuple(arguments[name] for name in names if name in arguments)


@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_triton_opcheck(op, overload, triton_ops):
    run = getattr(getattr(triton_ops, op), overload)
    torch.library.opcheck(run, by_position(op, overload, valid_arguments(op)))


@pytest.mark.parametrize(("op", "overload"), OVERLOADS)
def test_triton_compile(op, overload, triton_ops, fresh_compiler):
    arguments = valid_arguments(op)
    run = getattr(getattr(triton_ops, op), overload)

    def function(args):
        return run(*args)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        own = {n: twin(x) if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
        out = call(by_position(op, overload, own))
        out = out if isinstance(out, tuple) else (out,)
        written = [x for x in own.values() if isinstance(x, torch.Tensor)]
        results.append([x for x in (*out, *written) if x is not None])
    for eager, other in zip(*results, strict=True):
        assert_same_bits(other, eager)


# Index values are not checked on a GPU: rows out of range are skipped, nothing else is touched.

BAD_PLACES = [(-1, 0), (4, 0), (2**31 - 1, 0), (1, -1), (1, 2**31 - 1), (1, 8)]


@pytest.mark.parametrize(("slot", "column"), BAD_PLACES)
def test_triton_tokens_out_of_range_are_left_out(slot, column):
    cache = embed(torch.randn(4, 2, 8, 16))
    tokens = torch.randn(5, 2, 16)
    slots, columns = int32([2, slot]), int32([3, column])
    for zero_padding in (False, True):
        keys, values = twin(cache), twin(cache)
        expected = twin(cache)
        expected[2, :, 3:5] = tokens[:2].transpose(0, 1)
        if zero_padding:
            expected[2, :, :3] = 0
        baton_kernels.triton.insert_kv(
            tokens, tokens, keys, values, int32([0, 2, 5]), slots, columns,
            zero_padding=zero_padding,
        )  # fmt: skip
        assert_same_bits(storage(keys), storage(expected))
        assert_same_bits(storage(values), storage(expected))
    key, _ = baton_kernels.triton.extract_kv(
        cache, cache, int32([0, 2, 5]), slots, columns, total_tokens=5
    )
    assert_same_bits(key[:2], cache[2, :, 3:5].transpose(0, 1))
    keys, values, expected = twin(cache), twin(cache), twin(cache)
    expected[2, :, 3] = tokens[0]
    baton_kernels.triton.append_kv(tokens[:2], tokens[:2], keys, values, slots, columns)
    assert_same_bits(storage(keys), storage(expected))
    for source in (True, False):
        places = [(slots[1:], columns[1:]), (int32([0]), int32([0]))]
        (source_slot, source_start), (target_slot, target_start) = places[:: 1 if source else -1]
        keys = twin(cache)
        baton_kernels.triton.move_kv(
            keys, keys, source_slot, source_start, target_slot, target_start, int32([3])
        )
        assert_same_bits(storage(keys), storage(cache))


# Bounds of queries, and which queries are whole: no other is copied, not even in part.
WHOLE = [
    ([0, 3, 2], []), ([0, 4, 2, 6], []), ([0, 3, 9], [0]), ([-2, 3, 6], [1]), ([1, 3, 6], [0, 1]),
    ([4, 1], []), ([0, *range(0, 7), 5, 6], []), ([*[0] * 140, 4, 3, 6], []), ([0, 9, 5], []),
    ([0, -3, 5], []), ([7, 2, 9], []), ([0, 1, 6], [0]),
]  # fmt: skip


@pytest.mark.parametrize(("bounds", "whole"), WHOLE)
def test_triton_queries_are_copied_whole_or_not_at_all(bounds, whole):
    """Row 1 of the last case would end beyond the capacity."""
    queries = len(bounds) - 1
    tokens = torch.randn(6, 2, 16)
    cache = embed(torch.randn(queries, 2, 6, 16))
    keys, values, expected = twin(cache), twin(cache), twin(cache)
    starts = [2 if bounds == [0, 1, 6] else 1] * queries
    places = int32(bounds), int32(range(queries)), int32(starts)
    out = torch.full((2, 6, 2, 16), float("nan"))
    full = torch.ones(queries, 2, 6, 16)
    copied = torch.zeros(6, dtype=torch.bool)
    for i in whole:
        count = bounds[i + 1] - bounds[i]
        expected[i, :, : starts[i]] = 0
        of_query = tokens[bounds[i] : bounds[i + 1]].transpose(0, 1)
        expected[i, :, starts[i] : starts[i] + count] = of_query
        copied[bounds[i] : bounds[i + 1]] = True
    baton_kernels.triton.insert_kv(tokens, tokens, keys, values, *places, zero_padding=True)
    assert_same_bits(storage(keys), storage(expected))
    assert_same_bits(storage(values), storage(expected))
    baton_kernels.triton.extract_kv(full, full, *places, total_tokens=6, out=tuple(out))
    assert (out[:, copied] == 1).all() and out[:, ~copied].isnan().all()


@pytest.mark.parametrize("name", ["slots", "starts", "lengths"])
@pytest.mark.parametrize("value", [-1, 2**31 - 1, -(2**31)])
def test_triton_rows_out_of_range_see_nothing(name, value):
    problem = random_attention_problem([1, 20], [30, 40], head_dim=16)
    whole, _ = baton_kernels.triton.ragged_attention(*problem.args, return_lse=True)
    getattr(problem, name)[1] = value
    out, lse = baton_kernels.triton.ragged_attention(*problem.args, return_lse=True)
    assert_same_bits(out[:1], whole[:1])
    assert not out[1:].any()
    assert (lse[1:] == float("-inf")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_rms_norm_normalizes_the_sum_that_it_returns(dtype):
    x, residual, weight = torch.randn(3, 50, 200).to(dtype)
    y, total = baton_kernels.triton.rms_norm(x, weight[0], residual=residual)
    assert_same_bits(y, baton_kernels.triton.rms_norm(total, weight[0]))


def order_sensitive(rows, outs, ins, step=64):
    """Factors whose sums are exact within a step, and whose large steps cancel each other: the
    small ones that remain reveal the order in which steps were added."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-4, 5, shape, generator=generator).to(torch.bfloat16)

    x, weight = whole(rows, ins), whole(outs, ins)
    for i, (first, second) in enumerate(((0, 6), (1, 3), (5, 8))):
        here, there = (slice(step * k, step * (k + 1)) for k in (first, second))
        x[:, here] *= 2.0 ** (19 + i)
        x[:, there] = -x[:, here]
        weight[:, there] = weight[:, here]
    return x, weight


def test_triton_linear_adds_in_one_order(monkeypatch):
    """Tiles for one row, for some and for many, with two splits: the same additions."""
    ops, tiles = baton_kernels.triton, importlib.import_module("baton_kernels.triton.linear")
    # Uses larger tiles from seven on, instead of from the number that keeps a GPU busy.
    monkeypatch.setattr(tiles, "ENOUGH_MANY", 7)
    rows, outs, ins = 150, 300, 600
    x, weight = order_sensitive(rows, outs, ins)
    bias = torch.randn(outs).to(torch.bfloat16)

    def plan(count):
        return tiles.plan(count, outs, ins, 2, "matrix", 64 << 10)

    assert plan(rows).many and plan(rows).splits == 2
    expected = ops.linear(x, weight, bias)
    for some in ([0], [5, 7], list(range(16)), list(range(80, 113)), list(range(9, 100))):
        assert not plan(len(some)).many
        assert_same_bits(ops.linear(x[some], weight, bias), expected[some], f"{len(some)} rows")
    # The order matters: with in_features reversed the result differs.
    other = ops.linear(x[:16].flip(1).contiguous(), weight.flip(1).contiguous(), bias)
    assert not torch.equal(other, expected[:16])


@pytest.mark.parametrize("shape", [(2048, 2048), (16384, 2048), (2048, 8192), (57, 300), (1, 1)])
def test_triton_linear_splits_by_the_weight(shape):
    """Splits are whole steps, cover in_features, and depend on the weight only."""
    tiles = importlib.import_module("baton_kernels.triton.linear")
    plans = [
        tiles.plan(rows, *shape, 2, "matrix", shared)
        for rows in (1, 16, 17, 64, 65, 500, 4096)
        for shared in (64 << 10, 99 << 10, 227 << 10)
    ]
    assert len({(p.splits, p.split, p.step) for p in plans}) == 1
    assert plans[0].split % plans[0].step == 0
    assert plans[0].split * plans[0].splits >= shape[1] > plans[0].split * (plans[0].splits - 1)
    for p, shared in zip(plans, 7 * (64 << 10, 99 << 10, 227 << 10), strict=True):
        assert p.shared <= shared
        # With the shared memory of an H100 a program of few rows has 64 KB in flight.
        assert p.many or shared < 227 << 10 or p.flight >= 64 << 10
