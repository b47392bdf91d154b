"""Decode attention: shapes, padding, and how its time grows."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import torch

from baton_kernels import ragged_attention

from . import cuda_peers, peers
from .attention_work import AttentionWork, Heads
from .measure import LIMIT, OURS, Row, Way, Work
from .options import Options
from .report import dtype_name

LLAMA = Heads(32, 8, 128)
SMOLLM2 = Heads(9, 3, 64)


def decode_lengths(rows: int, low: int, high: int, mean: int) -> list[int]:
    """Lengths from low to high with this mean, the same on every machine: many short, few long
    ones."""
    shares = [row / max(rows - 1, 1) for row in range(rows)]
    # The exponent of a power curve with that mean, found by bisection.
    small, large = 0.1, 20.0
    for _ in range(60):
        power = (small + large) / 2
        lengths = [round(low + (high - low) * share**power) for share in shares]
        small, large = (power, large) if sum(lengths) > mean * rows else (small, power)
    random.Random(0).shuffle(lengths)
    return lengths


def shapes(options: Options) -> dict[str, tuple[Heads, list[int], int]]:
    """Heads, lengths and capacity of the decode shapes."""
    mixed = decode_lengths(32, 128, 2048, 686)
    found = {
        "32 rows of 128..2048": (LLAMA, mixed, 2048),
        "1 row of 32k": (LLAMA, [32768], 32768),
        "64 rows of 16..128": (LLAMA, decode_lengths(64, 16, 128, 72), 128),
        "32 rows, MHA 12/12 x 64": (Heads(12, 12, 64), mixed, 2048),
        "32 rows, MQA 32/1 x 128": (Heads(32, 1, 128), mixed, 2048),
        "32 rows, GQA 9/3 x 64": (SMOLLM2, mixed, 2048),
        "1 row of 8k among 31 of 128": (LLAMA, [128] * 15 + [8192] + [128] * 16, 8192),
    }
    if not options.tiny:
        return found
    return {
        label: (heads, [max(1, n // 128) for n in lengths[:4]], max(1, capacity // 128))
        for label, (heads, lengths, capacity) in found.items()
    }


def ours(work: AttentionWork, name: str = "ragged_attention") -> Way:
    """Our op, with padding that it must not read."""
    return Way(name, work.calls(ragged_attention), work.check, OURS, work.poison_padding)


def limit(options: Options, num_bytes: int) -> list[Way]:
    """The limit: reading the same number of bytes."""
    calls = options.device.readers(num_bytes)
    return [Way("read of the same bytes", calls, kind=LIMIT)] if calls else []


def decode(options: Options) -> Iterator[Work]:
    """One decoded token per row: GB/s of valid keys and values, compared with the read ceiling."""
    for dtype in options.dtypes:
        for label, (heads, lengths, capacity) in shapes(options).items():
            if options.only not in label:
                continue
            make = functools.partial(
                AttentionWork, heads, [1] * len(lengths), lengths, capacity=capacity, dtype=dtype,
                device=options.device,
            )  # fmt: skip
            work = make()
            ways = [ours(work), *options.peers(lambda w=work: decode_ways(w, options))]
            if options.device.name == "cpu":
                ways.insert(1, ours(make(huge_pages=True), "ragged_attention, huge pages"))
            yield Work(
                label, dtype_name(dtype), [*ways, *limit(options, work.bytes)],
                bytes=work.bytes, ceiling="read",
                values={"rows": len(lengths), "columns": work.columns, "capacity": capacity},
            )  # fmt: skip
            del work, ways


def decode_summary(rows: list[Row]) -> list[str]:
    """How close to reading the same bytes, measured in turns with ours. On a machine whose
    bandwidth changes between two works, this says more than the share of the ceiling."""
    lines = []
    for dtype, way in dict.fromkeys((r.dtype, r.way) for r in rows if r.kind == OURS):
        shares = []
        for row in rows:
            reads = [r.median_us for r in rows if r.kind == LIMIT and r.median_us
                     and (r.dtype, r.work) == (dtype, row.work)]  # fmt: skip
            if (row.dtype, row.way) == (dtype, way) and row.median_us and reads:
                shares.append(f"{row.work} {reads[0] / row.median_us:.0%}")
        if shares:
            lines.append(f"{dtype}, {way}, of reading the same bytes in turns: {'; '.join(shares)}")
    return lines


def decode_ways(work: AttentionWork, options: Options) -> list[Way]:
    """Every peer that runs on the work's device."""
    ways = peers.decode_peers(work, flex=options.flex)
    if options.device.name == "cuda":
        return [*ways, *cuda_peers.decode_peers(work)]
    return [*ways, *options.vllm.ways(work, options.effort)]


def padding(options: Options) -> Iterator[Work]:
    """The same lengths in slots of 2k, 8k and 32k, aligned and ragged: padding costs nothing."""
    lengths = decode_lengths(32, 128, 2048, 686)
    capacities = (2048, 8192, 32768)
    if options.tiny:
        lengths, capacities = [1, 5, 16], (16, 64, 256)
    for dtype in options.dtypes:
        ways, kept = [], []
        for capacity in capacities:
            for aligned in (False, True):
                work = AttentionWork(
                    LLAMA, [1] * len(lengths), lengths, capacity=capacity, dtype=dtype,
                    device=options.device, aligned=aligned,
                )  # fmt: skip
                ways.append(ours(work, f"{'aligned' if aligned else 'ragged'} in {capacity}"))
                kept.append(work)
        # All in turns: differences of a few percent would be lost in separate measurements.
        yield Work(
            f"{len(lengths)} rows of {min(lengths)}..{max(lengths)}",
            dtype_name(dtype), ways, bytes=kept[0].bytes, ceiling="read",
        )  # fmt: skip


def padding_summary(rows: list[Row]) -> list[str]:
    """The spread over capacities and alignments."""
    lines = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        times = [row.median_us for row in rows if row.dtype == dtype and row.median_us]
        if times:
            lines.append(f"{dtype}: slowest / fastest = {max(times) / min(times):.3f}")
    return lines


def thread_counts(options: Options) -> list[int]:
    """1, 2, 4, ... and the chosen number; only the latter where threads do not matter."""
    if options.device.name != "cpu":
        return [options.threads]
    doubled = [1 << i for i in range(options.threads.bit_length())]
    return sorted({*doubled, options.threads})


def scaling(options: Options) -> Iterator[Work]:
    """Time as a function of valid columns, on 1, 2, 4, ... threads."""
    counts = (2, 4, 8) if options.tiny else (1024, 2048, 4096, 8192, 16384, 32768)
    for dtype in options.dtypes:
        for threads in thread_counts(options):
            for columns in counts:
                lengths = [columns // 2, columns // 4, columns // 4]
                work = AttentionWork(
                    LLAMA, [1] * 3, [max(1, n) for n in lengths], dtype=dtype,
                    device=options.device,
                )  # fmt: skip
                with options.device.on_threads(threads):
                    yield Work(
                        f"{work.columns} columns", dtype_name(dtype),
                        [ours(work), *limit(options, work.bytes)], bytes=work.bytes,
                        values={"columns": work.columns},
                    )  # fmt: skip


def scaling_summary(rows: list[Row]) -> list[str]:
    """A line fitted to the times, its residuals, and the gain of a second thread."""
    lines, slopes = [], {}
    mine = [row for row in rows if row.kind == OURS and row.median_us]
    for dtype, threads in dict.fromkeys((row.dtype, row.threads) for row in mine):
        points = [
            (row.values["columns"], row.median_us)
            for row in mine
            if (row.dtype, row.threads) == (dtype, threads)
        ]
        x = torch.tensor([point[0] for point in points], dtype=torch.float64)
        y = torch.tensor([point[1] for point in points], dtype=torch.float64)
        # Each point counts by its relative error, so that short ones have the same weight as long
        # ones.
        design = torch.stack((torch.ones_like(x), x), 1) / y[:, None]
        fit = torch.linalg.lstsq(design, torch.ones_like(y)[:, None]).solution[:, 0]
        left = (fit[0] + fit[1] * x - y) / y
        slopes[dtype, threads] = fit[1].item()
        residuals = ", ".join(f"{value:+.1%}" for value in left.tolist())
        lines.append(
            f"{dtype}, {threads} threads: {fit[0]:.1f} us + {1e3 * fit[1]:.2f} ns per column; "
            f"residuals {residuals}"
        )
        if threads > 1 and (dtype, 1) in slopes:
            gain = slopes[dtype, 1] / slopes[dtype, threads]
            lines.append(f"{dtype}: {threads} threads are {gain:.2f}x as fast as 1 (slopes)")
            limits = {
                n: sum(r.median_us for r in rows if r.kind == "limit" and r.threads == n
                       and r.dtype == dtype and r.median_us)
                for n in (1, threads)
            }  # fmt: skip
            if all(limits.values()):
                lines.append(f"{dtype}: reading only: {limits[1] / limits[threads]:.2f}x")
    return lines
