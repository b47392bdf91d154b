"""The cost of a call: with nothing to do, and with the rows of a decode step to check."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional

import baton_kernels as bk
from baton_kernels.testing import assert_same_bits, cumulative, int32

from .attention_cases import SMOLLM2
from .empty_ops import empty_ops
from .layer_cases import INNER
from .measure import LIMIT, OURS, Row, Way, Work
from .options import Options

# Layers of a step, all of which call the ops with the same rows.
LAYERS = 30


def overhead(options: Options) -> Iterator[Work]:
    """A call of each op with nothing to do, compared with calls of torch's own ops."""
    if options.device.name != "cpu":
        return  # nothing is launched, so the device's clock measures nothing
    device, none = options.device.name, int32([], options.device.name)
    cache, index = torch.zeros(1, 2, 8, 16, device=device), cumulative([], device)
    other = cache.clone()
    tokens = torch.zeros(0, 2, 16, device=device)
    scores, lse = torch.zeros(0, 2, 1, 8, device=device), torch.zeros(0, 2, device=device)
    weight = torch.ones(16, device=device)
    empty, square = torch.zeros(0, 16, device=device), torch.zeros(16, 16, device=device)
    # The same with torch's own ops: rows of a cache by long indices, attention per head.
    rows, heads = torch.zeros(0, dtype=torch.long, device=device), tokens.transpose(0, 1)
    gate = empty[:, :8]

    def put() -> None:
        cache.index_put_((rows, rows), lse[:, :1, None].expand(0, 8, 16))
        other.index_put_((rows, rows), lse[:, :1, None].expand(0, 8, 16))

    def take() -> tuple[torch.Tensor, torch.Tensor]:
        return cache.index_select(0, rows), other.index_select(0, rows)

    attend = functools.partial(functional.scaled_dot_product_attention, heads, heads, heads)
    norm = functools.partial(functional.rms_norm, empty, (16,), weight, 1e-6)
    ops: dict[str, tuple[tuple, str, Callable[[], object] | None]] = {
        "insert_kv": ((tokens, tokens, cache, other, index, none, none), "index_put_ twice", put),
        "append_kv": ((tokens, tokens, cache, other, none, none), "index_put_ twice", put),
        "move_kv": ((cache, other, none, none, none, none, none), "", None),
        "extract_kv": ((cache, cache, index, none, none), "index_select twice", take),
        "ragged_attention": ((tokens, cache, cache, index, none, none, none), "SDPA", attend),
        "merge_attention": ((tokens, lse, tokens, lse), "", None),
        "attention_mask": ((none, none, 1, 8), "", None),
        "masked_softmax": ((scores, none, none), "softmax", lambda: scores.softmax(-1)),
        "rms_norm": ((empty, weight), "rms_norm", norm),
        "silu_and_mul": ((empty,), "silu and product", lambda: functional.silu(gate) * gate),
        "likeliest": ((empty,), "argmax", lambda: empty.argmax(-1)),
        "linear": ((empty, square), "linear", lambda: functional.linear(empty, square)),
    }
    for name, (arguments, like, peer) in ops.items():
        named = {"total_tokens": 0} if name == "extract_kv" else {}
        call = functools.partial(getattr(bk, name), *arguments, **named)
        count = sum(isinstance(x, torch.Tensor) for x in arguments)
        others = functools.partial(torch.cat, [empty] * count)
        ways = [Way(f"{name}, {count} tensors", [call], kind=OURS)]
        ways.append(Way(f"torch.cat of {count}", [others]))
        if peer is not None:
            ways.append(Way(f"torch: {like}", [peer]))
        # As the Python function calls the op: arguments without a default come last.
        behind = {"extract_kv": (0,), "rms_norm": (1e-6,)}
        empty_op = getattr(empty_ops(), name).default
        nothing = functools.partial(empty_op, *arguments, *behind.get(name, ()))
        ways.append(Way("torch.ops, an op that does nothing", [nothing], kind=LIMIT))
        yield Work(name, "float32", ways, inner=INNER)


def overhead_summary(rows: list[Row]) -> list[str]:
    """The cost of a call, in calls of other functions."""
    lines = []
    for peers, text in (
        ("torch.cat", "torch.cat"),
        ("torch: ", "torch's ops for the same"),
        ("torch.ops", "an op that does nothing"),
    ):
        found = [row for row in rows if row.way.startswith(peers) and row.ratio]
        if found:
            ratios = "; ".join(f"{row.work} {1 / row.ratio:.2f}" for row in found)
            lines.append(f"times {text}: {ratios}")
    cat = {row.work: row.median_us for row in rows if row.way.startswith("torch.cat")}
    nothing = [row for row in rows if row.way.startswith("torch.ops") and row.median_us]
    if nothing:
        ratios = "; ".join(f"{row.work} {row.median_us / cat[row.work]:.2f}" for row in nothing)
        lines.append(f"an op that does nothing, times torch.cat: {ratios}")
    return lines


def step(options: Options) -> Iterator[Work]:
    """Calls for rows of one column, microseconds each: rows seen before, and new ones each time."""
    if options.device.name != "cpu":
        return  # the host does not check rows there
    device, heads = options.device.name, SMOLLM2
    for count in options.pick((1, 8, 32, 128), None, (1, 2)):
        cache = torch.randn(count + 1, heads.kv, 2, heads.dim, device=device)
        caches = cache, cache.clone()
        query = torch.randn(count, heads.query, heads.dim, device=device)
        key, value = (torch.randn(count, heads.kv, heads.dim, device=device) for _ in range(2))
        ones, zeros = int32([1] * count, device), int32([0] * count, device)
        # Two sets of rows in alternation, so that no call has the rows of the call before.
        slots = [int32(range(first, first + count), device) for first in (0, 1)]
        bounds = cumulative([1] * count, device)

        def attend(rows: torch.Tensor, query=query, caches=caches, bounds=bounds, zeros=zeros,
                   ones=ones) -> torch.Tensor:  # fmt: skip
            return bk.ragged_attention(query, *caches, bounds, rows, zeros, ones)

        def append(rows: torch.Tensor, key=key, value=value, caches=caches, zeros=zeros) -> None:
            bk.append_kv(key, value, *caches, rows, zeros)

        for name, function in (("append_kv", append), ("ragged_attention", attend)):
            same = functools.partial(function, slots[0])
            turns = itertools.cycle(slots)

            def alternating(function=function, turns=turns) -> object:
                return function(next(turns))

            # A row of one token sees only that token, so the result is its value.
            def check(result: torch.Tensor | None, value=caches[1], count=count) -> None:
                if result is not None:
                    seen = value[:count, :, 0].repeat_interleave(heads.query // heads.kv, 1)
                    assert_same_bits(result, seen, "attention of one token")

            yield Work(
                f"{name}, {count} rows", "float32",
                [Way("rows of the call before", [same], check, OURS),
                 Way("other rows each time", [alternating])],
                inner=LAYERS, values={"rows": count},
            )  # fmt: skip


def step_summary(rows: list[Row]) -> list[str]:
    """The cost of checking and planning a row, if the call before had other rows."""
    lines = []
    for op in ("append_kv", "ragged_attention"):
        found = [row for row in rows if row.work.startswith(op) and row.median_us]
        if not found:
            continue
        most = max(row.values["rows"] for row in found)
        known, new = (row.median_us for row in found if row.values["rows"] == most)
        lines.append(
            f"{op}, {most} rows: {new - known:.2f} us to check and plan, once per step of "
            f"{LAYERS} layers; {known:.2f} us a call"
        )
    return lines
