"""Rows computed twice, the second time with everything changed that must not matter to them.

Case n is drawn from (seed, n): an op, a batch, and for each of its rows another call that has the
row too. Bits are compared. `scripts/soak.py equality` runs as many as it is told.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable
from random import Random

import torch
from eight_bit import EIGHT_BITS, eight_bit_problem, pages_of
from paged import LAYOUTS, paged_problem

import baton_kernels
from baton_kernels.testing import (
    DTYPES,
    Row,
    assert_same_bits,
    attention_problem,
    available_cpu_isas,
    cpu_isa,
    cpu_threads,
    embed,
    int32,
    random_rows,
)

# Around the ends of blocks, of segments and of tiles.
LENGTHS = (1, 2, 15, 31, 63, 64, 65, 130, 511, 512, 513, 600, 1100)
CHUNKS = (1, 1, 1, 2, 5, 16, 33, 70)


@dataclasses.dataclass
class Report:
    """Cases, rows compared by op, and numbers and messages of those that differed."""

    cases: int = 0
    rows: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[tuple[int, str]] = dataclasses.field(default_factory=list)


def run(
    seed: int, cases: Iterable[int], seconds: float = 0.0,
    say: Callable[[Report], object] = lambda report: None,
) -> Report:  # fmt: skip
    """Runs the cases of these numbers; `seconds` ends it early, 0 does not."""
    report = Report()
    end = time.monotonic() + seconds if seconds else float("inf")
    for number in cases:
        if time.monotonic() > end:
            break
        r = Random(f"{seed} {number}")
        name = r.choices(list(CASES), [8 if name == "ragged_attention" else 1 for name in CASES])[0]
        try:
            with cpu_isa(r.choice(available_cpu_isas())):
                report.rows[name] += CASES[name](r)
        except AssertionError as error:
            report.wrong.append((number, f"{name}: {error}"))
        report.cases += 1
        if report.cases % 500 == 0:
            say(report)
    return report


def threads(r: Random):
    return cpu_threads(r.choice((1, 1, 2, 3)))


# Attention


def attention(r: Random) -> int:
    """All tokens of each row, cut into chunks that run in separate batches."""
    group, num_kv_heads = r.choice(((1, 2), (2, 1), (2, 2), (3, 1), (8, 1), (40, 1)))
    num_heads, head_dim = group * num_kv_heads, r.choice((16, 24, 64, 64, 80, 128))
    lengths = [r.choice(LENGTHS) for _ in range(r.randint(1, 5))]
    counts = [min(r.choice(CHUNKS), length) for length in lengths]
    rows = random_rows(
        counts, lengths, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        dtype=r.choice(DTYPES), seed=r.getrandbits(30),
    )  # fmt: skip
    options = {"return_lse": True, "causal": r.random() < 0.9}
    if r.random() < 0.3:
        options["window"] = r.choice((1, 3, 37, 100))
    if r.random() < 0.2:
        options["softcap"] = 5.0
    if r.random() < 0.2:
        options["alibi_slopes"] = torch.rand(num_heads, generator=generator(r))
    if r.random() < 0.2:
        options["sinks"] = torch.randn(num_heads, generator=generator(r))
    stored = r.choice((None, None, None, *EIGHT_BITS))
    expected = attend(r, rows, stored, options)
    for row, wanted in zip(rows, expected, strict=True):
        # Without a mask an earlier chunk would see fewer keys.
        cut = random_cut(r, len(row.query)) if options["causal"] else [len(row.query)]
        parts = []
        for chunk in chunks_of(row, cut):
            others = r.sample(rows, r.randint(0, len(rows)))
            batch = [*others, chunk]
            r.shuffle(batch)
            place = next(i for i, one in enumerate(batch) if one is chunk)
            parts.append(attend(r, batch, stored, options)[place])
        for what, got, want in zip(("out", "lse"), zip(*parts, strict=True), wanted, strict=True):
            assert_same_bits(torch.cat(got), want, what)
    return len(rows)


def attend(r: Random, rows: list[Row], stored, options) -> list[tuple[torch.Tensor, ...]]:
    """Output and lse of each row, in a cache of any layout."""
    seed, margins = r.getrandbits(30), r.choice((None, (1, 2, 3, 0), (0, 0, 0, 0)))
    dense = attention_problem(
        rows, seed=seed, columns_first=r.random() < 0.3, margins=margins,
        num_slots=len(rows) + r.randint(0, 3),
        capacity=max(len(row.key) for row in rows) + r.choice((0, 1, 7, 40)),
    )  # fmt: skip
    page = r.choice((None, None, 16, 32, 48, 256))
    if stored is not None:
        problem = eight_bit_problem(dense, stored)
        arguments = problem.arguments if page is None else pages_of(problem, page, seed)
    elif page is not None:
        arguments = paged_problem(dense, page, layout=r.choice(LAYOUTS), seed=seed).arguments
    else:
        arguments = vars(dense)
    with threads(r):
        results = baton_kernels.ragged_attention(**arguments, **options)
    return list(zip(*(dense.split(x) for x in results), strict=True))


def random_cut(r: Random, tokens: int) -> list[int]:
    cut = []
    while sum(cut) < tokens:
        cut.append(min(r.choice(CHUNKS), tokens - sum(cut)))
    # Many chunks of one token would say the same many times.
    return cut if len(cut) < 12 else [*cut[:10], tokens - sum(cut[:10])]


def chunks_of(row: Row, cut: list[int]) -> list[Row]:
    """The row as it was when each chunk was its last."""
    rows, first, before = [], 0, len(row.key) - len(row.query)
    for count in cut:
        end = first + count
        rows.append(Row(row.query[first:end], row.key[: before + end], row.value[: before + end]))
        first = end
    return rows


# Ops of one row each


def generator(r: Random) -> torch.Generator:
    return torch.Generator().manual_seed(r.getrandbits(30))


def rowwise(make: Callable) -> Callable[[Random], int]:
    """A case of an op whose arguments are rows.

    Args:
        make: from the random numbers and a number of rows to the tensors of rows, and to a function
            of such tensors that returns one or more tensors of rows.
    """

    def case(r: Random) -> int:
        count = r.choice((1, 2, 5, 16, 17, 40, 97, 200))
        tensors, op = make(r, count)
        count = len(tensors[0])
        with threads(r):
            expected = op(*(embed(x) for x in tensors))
        for _ in range(3):
            chosen = r.sample(range(count), r.choice((1, 1, min(3, count), count)))
            with threads(r):
                found = op(*(embed(x[chosen]) for x in tensors))
            for got, want in zip(as_tuple(found), as_tuple(expected), strict=True):
                assert_same_bits(got, want[chosen], f"rows {chosen[:5]} of {count}")
        return 3 * count

    return case


def as_tuple(x) -> tuple[torch.Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def numbers(r: Random, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=generator(r)).to(dtype)


def linear(r: Random, count: int):
    dtype, size_in, size_out = r.choice(DTYPES), r.choice((1, 31, 64, 130)), r.choice((1, 48, 130))
    weight = numbers(r, size_out, size_in, dtype=dtype)
    bias = numbers(r, size_out, dtype=dtype) if r.random() < 0.3 else None
    packed = r.choice((None, dtype, torch.int8))
    if packed is not None:
        weight = baton_kernels.pack_linear(weight, dtype=packed)
    return [numbers(r, count, size_in, dtype=dtype)], lambda x: baton_kernels.linear(
        x, weight, bias
    )


def rms_norm(r: Random, count: int):
    dtype, size = r.choice(DTYPES), r.choice((1, 7, 64, 130))
    weight, x = numbers(r, size, dtype=dtype), numbers(r, count, size, dtype=dtype)
    if r.random() < 0.5:
        return [x], lambda x: baton_kernels.rms_norm(x, weight, 1e-6)
    return (
        [x, numbers(r, count, size, dtype=dtype)],
        lambda x, residual: baton_kernels.rms_norm(x, weight, 1e-6, residual=residual),
    )


def silu_and_mul(r: Random, count: int):
    x = numbers(r, count, 2 * r.choice((1, 7, 64, 130)), dtype=r.choice(DTYPES))
    return [x], baton_kernels.silu_and_mul


def likeliest(r: Random, count: int):
    return [
        numbers(r, count, r.choice((1, 7, 300)), dtype=r.choice(DTYPES))
    ], baton_kernels.likeliest


def merge_attention(r: Random, count: int):
    dtype, heads = r.choice(DTYPES), r.choice((1, 3))
    out = [numbers(r, count, heads, 24, dtype=dtype) for _ in range(2)]
    lse = [numbers(r, count, heads, dtype=torch.float32) for _ in range(2)]

    def op(out_a, lse_a, out_b, lse_b):
        return baton_kernels.merge_attention(out_a, lse_a.contiguous(), out_b, lse_b.contiguous())

    return [out[0], lse[0], out[1], lse[1]], op


def append_kv(r: Random, count: int):
    """Results are what append_kv rotates and writes, into any slots."""
    dtype, heads, dim = r.choice(DTYPES), r.choice((1, 2)), r.choice((16, 24, 64))
    query, key, value = (numbers(r, count, heads, dim, dtype=dtype) for _ in range(3))
    cos, sin = (numbers(r, count, dim // 2, dtype=torch.float32) for _ in range(2))
    places = Random(r.getrandbits(30))

    def op(query, key, value, cos, sin):
        rows = len(query)
        caches = [query.new_empty(rows, heads, 5, dim) for _ in range(2)]
        slots = places.sample(range(rows), rows)
        columns = [places.randrange(5) for _ in range(rows)]
        rotated = baton_kernels.append_kv(
            key, value, *caches, int32(slots), int32(columns), query=query, cos=cos, sin=sin
        )
        return rotated, *(cache[slots, :, columns] for cache in caches)

    return [query, key, value, cos, sin], op


def masked_softmax(r: Random, count: int):
    dtype, queries, columns = r.choice(DTYPES), r.choice((1, 4)), r.choice((9, 77))
    count = min(count, 40)
    scores = numbers(r, count, 2, queries, columns, dtype=dtype)
    lengths = torch.tensor([r.randint(0, columns) for _ in range(count)], dtype=torch.int32)
    starts = torch.tensor([r.randint(0, columns - int(n)) for n in lengths], dtype=torch.int32)
    window = r.choice((None, 3))

    def op(scores, starts, lengths):
        return baton_kernels.masked_softmax(
            scores, starts.contiguous(), lengths.contiguous(), scale=0.5, window=window
        )

    return [scores, starts, lengths], op


CASES: dict[str, Callable[[Random], int]] = {
    "ragged_attention": attention,
    **{
        make.__name__: rowwise(make)
        for make in (
            linear,
            rms_norm,
            silu_and_mul,
            likeliest,
            merge_attention,
            append_kv,
            masked_softmax,
        )  # fmt: skip
    },
}
