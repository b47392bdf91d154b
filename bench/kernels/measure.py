"""Checks several ways of doing the same work, then times them in turns on cold data."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

OURS, PEER, LIMIT = "ours", "peer", "limit"


@dataclass
class Way:
    """One way of doing the work.

    Args:
        name: As the table prints it.
        calls: One per copy of the data; they are used in turns, so that caches stay cold.
        check: Takes the result of a call and raises AssertionError if it is wrong.
        kind: OURS, PEER, or LIMIT for what no op could be faster than.
        reset: Undoes the writes of an earlier way, before the check.
        missing: Why this way cannot run here; it has no calls then.
        times: Seconds, if they were measured elsewhere.
    """

    name: str
    calls: Sequence[Callable[[], object]] = ()
    check: Callable[[object], None] | None = None
    kind: str = PEER
    reset: Callable[[], object] = lambda: None
    missing: str = ""
    times: Sequence[float] = ()


@dataclass
class Work:
    """One piece of work and all ways of doing it.

    Args:
        label: What is done.
        ways: The others are compared with the first one of ours.
        bytes: Bytes that any way has to move; 0 where that is not the limit.
        flops: Floating-point operations, likewise.
        ceiling: The name of the limit in `Limits`; none if empty.
        inner: Calls per timing; more than 1 where a call takes microseconds.
        values: Numbers that a summary of the table needs, such as columns.
    """

    label: str
    dtype: str
    ways: list[Way]
    bytes: int = 0
    flops: int = 0
    ceiling: str = ""
    inner: int = 1
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Row:
    """One line of a table; `share` and `rate` are None without a ceiling or a figure."""

    case: str
    work: str
    dtype: str
    threads: int
    way: str
    kind: str
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    repeats: int = 0
    rate: float | None = None
    unit: str = ""
    ceiling: str = ""
    share: float | None = None
    ratio: float | None = None  # this way's time divided by ours
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)


@dataclass
class Effort:
    """How long to measure.

    Args:
        seconds: For each way of each work; a slow one runs `least` times regardless.
        least: The fewest runs.
        most: The most runs.
    """

    seconds: float = 1.0
    least: int = 5
    most: int = 200


def refused(way: Way) -> str:
    """Why a way's result is wrong or a peer gives none; empty if the result is right."""
    if way.check is None:
        return ""
    way.reset()
    try:
        way.check(way.calls[0]())
    except AssertionError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:
        if way.kind != PEER:
            raise
        # A peer may lack a dtype or run out of memory, which is not an error of ours.
        return f"missing: {describe(error)}"
    return ""


def describe(error: Exception) -> str:
    """One short line."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:80]}"


def kept(calls: Sequence[Callable[[], object]]) -> list[Callable[[], object]]:
    """The same calls, each of which keeps its result until it is called again.

    Each call then has its own result memory, as cold as the inputs; otherwise the allocator would
    reuse one block again and again, from the processor's cache.
    """
    results: list[object] = [None] * len(calls)

    def run(i: int) -> object:
        results[i] = None
        results[i] = calls[i]()
        return results[i]

    return [functools.partial(run, i) for i in range(len(calls))]


# The most runs of a way in one turn, and the seconds after which a turn ends.
_RUNS_IN_TURN, _SECONDS_IN_TURN = 8, 0.05


def time_in_turns(
    ways: Sequence[Way],
    effort: Effort,
    clock: Callable[[Callable], float],
    inner: int = 1,
    settle: Callable[[], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every run; the ways take turns.

    A temporary disturbance of the machine thus affects all of them. If ways have threads of
    different libraries, `settle` waits until those of the last way have stopped spinning. A turn
    then begins with an untimed run that wakes the way's own threads, and consists of several runs.
    """
    times: dict[str, list[float]] = {way.name: [] for way in ways}
    turns = {way.name: itertools.cycle(way.calls) for way in ways}
    for way in ways:
        next(turns[way.name])()
    gc.collect()
    gc.disable()
    try:
        left = list(ways)
        while left:
            for way in left:
                if settle is not None:
                    settle()
                    next(turns[way.name])()
                spent = 0.0
                for _ in range(1 if settle is None else _RUNS_IN_TURN):
                    call = next(turns[way.name])
                    if inner > 1:
                        call = functools.partial(_repeat, call, inner)
                    seconds = clock(call)
                    times[way.name].append(seconds / inner)
                    spent += seconds
                    if spent > _SECONDS_IN_TURN or _enough(times[way.name], effort, inner):
                        break
            left = [way for way in left if not _enough(times[way.name], effort, inner)]
    finally:
        gc.enable()
    return times


def _repeat(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def _enough(times: list[float], effort: Effort, inner: int) -> bool:
    count, spent = len(times), inner * sum(times)
    return count >= effort.most or (count >= effort.least and spent >= effort.seconds)


def measure(
    case: str,
    work: Work,
    effort: Effort,
    clock: Callable[[Callable], float],
    threads: int,
    settle: Callable[[], object] | None = None,
) -> list[Row]:
    """The rows of one work: first the gate, then timing; what is missing or refused gets no
    figure."""
    notes = {way.name: way.missing and f"missing: {way.missing}" for way in work.ways}
    for way in work.ways:
        if way.calls:
            notes[way.name] = refused(way)
    runnable = [way for way in work.ways if way.calls and not notes[way.name]]
    times = time_in_turns(runnable, effort, clock, work.inner, settle if threads > 1 else None)
    times |= {way.name: list(way.times) for way in work.ways if way.times and not notes[way.name]}
    rows = []
    for way in work.ways:
        row = Row(case, work.label, work.dtype, threads, way.name, way.kind, note=notes[way.name])
        row.ceiling, row.values = work.ceiling, work.values
        if way.name in times:
            _fill(row, work, sorted(times[way.name]))
        rows.append(row)
    ours = next((row.median_us for row in rows if row.kind == OURS and row.median_us), None)
    for row in rows:
        if ours and row.median_us:
            row.ratio = row.median_us / ours
    return rows


def _fill(row: Row, work: Work, times: list[float]) -> None:
    low, high = times[0], times[-1]
    if len(times) >= 3:
        deciles = statistics.quantiles(times, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    median = statistics.median(times)
    row.median_us, row.p10_us, row.p90_us = (1e6 * t for t in (median, low, high))
    row.repeats = len(times)
    if work.bytes:
        row.rate, row.unit = work.bytes / median / 1e9, "GB/s"
    elif work.flops:
        row.rate, row.unit = work.flops / median / 1e12, "TFLOP/s"
