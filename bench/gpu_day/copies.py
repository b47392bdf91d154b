"""insert, extract, move and append as CUDA graphs, compared with a device copy of the same size."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from baton_kernels import append_kv, extract_kv, insert_kv, move_kv
from baton_kernels.testing import assert_same_bits, int32

from ..kernels.measure import LIMIT, OURS, Way
from .decode import Sizes
from .device import Stage, run
from .timing import our_us, time_ways

KV_HEADS, DIM = 8, 128


class Problem:
    """A cache whose layers together exceed the L2 cache, and a query for it.

    Args:
        stage: the stage.
        slots: of the cache.
        capacity: columns of a slot.
        tokens: length of the query that is inserted, extracted or moved.
    """

    def __init__(self, stage: Stage, slots: int, capacity: int, tokens: int):
        self.tokens, self.start = tokens, capacity // 4
        # Keys and values of one layer: read once and written once.
        self.bytes = 2 * tokens * KV_HEADS * DIM * stage.dtype.itemsize
        self.layers = max(2, min(64, 4 * Sizes(stage).cache_bytes // self.bytes + 1))
        like = {"dtype": stage.dtype, "device": stage.device}
        shape = (self.layers, slots, KV_HEADS, capacity, DIM)
        self.keys, self.values = (torch.randn(shape, **like) for _ in range(2))
        packed = (self.layers, tokens, KV_HEADS, DIM)
        self.key, self.value = (torch.randn(packed, **like) for _ in range(2))
        self.outs = [torch.empty(packed, **like) for _ in range(2)]
        self.device = stage.device
        self.bounds = int32([0, tokens], stage.device)
        self.slot = int32([slots - 1], stage.device)
        self.at = int32([self.start], stage.device)

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys[layer], self.values[layer]

    def row(self, layer: int, start: int) -> list[torch.Tensor]:
        """Keys and values of the query's columns, `[tokens, heads, dim]`."""
        columns = slice(start, start + self.tokens)
        return [x[-1, :, columns].transpose(0, 1) for x in self.layer(layer)]

    def each(self, call: Callable[[int], object]) -> list[Callable[[], object]]:
        return [lambda layer=layer: call(layer) for layer in range(self.layers)]


def operations(problem: Problem) -> Iterator[tuple[str, Callable, Callable]]:
    """For each operation its name, a call for a layer, and a check of the content of layer 0."""
    p = problem

    def is_inserted(_: object) -> None:
        for got, want in zip(p.row(0, p.start), (p.key[0], p.value[0]), strict=True):
            assert_same_bits(got, want)

    yield "insert", lambda i: insert_kv(
        p.key[i], p.value[i], *p.layer(i), p.bounds, p.slot, p.at
    ), is_inserted  # fmt: skip

    def is_extracted(_: object) -> None:
        for got, want in zip(p.outs, p.row(0, p.start), strict=True):
            assert_same_bits(got[0], want)

    yield "extract", lambda i: extract_kv(
        *p.layer(i), p.bounds, p.slot, p.at, total_tokens=p.tokens,
        out=(p.outs[0][i], p.outs[1][i]),
    ), is_extracted  # fmt: skip
    near = p.start + 2
    for name, target in (("move over itself", near), ("move apart", p.start + p.tokens)):
        places = [p.slot, p.at, p.slot, int32([target], p.device), int32([p.tokens], p.device)]
        before = [x.clone() for x in p.row(0, p.start)]

        def is_moved(_: object, target: int = target, before: list = before) -> None:
            for got, want in zip(p.row(0, target), before, strict=True):
                assert_same_bits(got, want)

        yield name, lambda i, places=places: move_kv(*p.layer(i), *places), is_moved


@torch.inference_mode()
def copies(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    for tokens in stage.pick((512, 64, 4096), (8,)):
        slots, capacity = stage.pick((8, max(2048, 3 * tokens)), (2, 32))
        problem = Problem(stage, slots, capacity, tokens)
        # Memory that no op of this table has touched since the last replay.
        source = torch.randn(problem.layers, problem.bytes // 4, device=stage.device)
        target = torch.empty_like(source)
        copier = problem.each(lambda i, t=target, s=source: t[i].copy_(s[i]))
        for name, call, check in operations(problem):
            label = f"{name}, {tokens} tokens"
            if not record.wants(label, 2.0):
                continue
            with record.attempt(label):
                found = time_ways(
                    [Way(name, problem.each(call), check, OURS),
                     Way("device copy", copier, kind=LIMIT)],
                    stage.device,
                )  # fmt: skip
                add(stage, label, problem.bytes, found)
        del problem, source, target, copier
    append(stage)
    rows = [row for row in record.rows if row.get("of_copy")]
    record.headline = f"{len(rows)} copies; time of a device copy as a share of ours"
    record.lines = [f"{row['case']:32} {row['us']:8.2f} us, {row['of_copy']:.0%}" for row in rows]


def append(stage: Stage) -> None:
    """One token per row with rotary embedding: microseconds, compared with a copy of the same
    size."""
    for rows in stage.pick((1, 32, 128), (2,)):
        label = f"append with rotary, {rows} rows"
        if not stage.record.wants(label, 2.0):
            continue
        with stage.record.attempt(label):
            problem = Problem(stage, rows, stage.pick(1024, 16), rows)
            heads = 4 * KV_HEADS
            like = {"dtype": stage.dtype, "device": stage.device}
            query = torch.randn(problem.layers, rows, heads, DIM, **like)
            angle = torch.rand(rows, DIM // 2, device=stage.device)
            slots = int32(range(rows), stage.device)
            columns = int32([problem.start] * rows, stage.device)
            cos, sin = angle.cos(), angle.sin()

            def call(i: int, p=problem, q=query, c=cos, s=sin, at=(slots, columns)) -> object:
                return append_kv(p.key[i], p.value[i], *p.layer(i), *at, query=q[i], cos=c, sin=s)

            def check(_: object, p=problem) -> None:
                assert_same_bits(p.values[0][:, :, p.start], p.value[0])

            moved = problem.bytes + query[0].nbytes
            source = torch.randn(problem.layers, moved // 4, device=stage.device)
            target = torch.empty_like(source)
            copier = problem.each(lambda i, t=target, s=source: t[i].copy_(s[i]))
            found = time_ways(
                [Way("append", problem.each(call), check, OURS),
                 Way("device copy", copier, kind=LIMIT)],
                stage.device,
            )  # fmt: skip
            add(stage, label, moved, found)


def add(stage: Stage, label: str, num_bytes: int, found: list[dict]) -> None:
    us = our_us(found)
    copy = next((way.get("us") for way in found if way["kind"] == LIMIT), None)
    stage.record.add(
        label, bytes=num_bytes, ways=found, us=us, gb_per_s=us and 2 * num_bytes / us / 1e3,
        of_copy=us and copy and copy / us,
    )  # fmt: skip


if __name__ == "__main__":
    run(copies)
