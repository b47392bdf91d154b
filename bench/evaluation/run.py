"""One run of one system: requests are submitted as they arrive, and every token is timed."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..workloads import Request

LATENCIES = ("ttft", "time_per_token", "normalized_latency")


@dataclass(frozen=True)
class Job:
    """A request with the tokens of its prompt."""

    request: Request
    token_ids: list[int]


@dataclass
class Run:
    """The result of one run.

    Attributes:
        tokens: answers, in the order of the jobs.
        figures: by name; None where a figure does not exist.
        spans: [slot, job, begin, end, kind], in seconds from the beginning of the run.
    """

    tokens: list[list[int]]
    figures: dict[str, float | None]
    spans: list[list] = field(default_factory=list)


def make_jobs(requests: Sequence[Request], stream: Sequence[int]) -> list[Job]:
    """Prompts of the requested lengths, taken from a stream of tokens.

    Each request begins at a different place in the stream, which wraps around. Prompts with equal
    beginnings would be cheaper for an engine that shares prefixes.
    """
    jobs = []
    for index, request in enumerate(requests):
        # The distance is a prime, so among some hundred prompts no two begin alike.
        begin = index * 7919 % len(stream)
        ids = [stream[(begin + i) % len(stream)] for i in range(request.prompt_tokens)]
        jobs.append(Job(request, ids))
    return jobs


def latencies(
    requests: Sequence[Request], token_times: Sequence[Sequence[float]]
) -> dict[str, float]:
    """p50 and p99 of three latencies, in seconds.

    `ttft` is from arrival to first token; `time_per_token` is between two tokens of a query, over
    all queries, including pauses; `normalized_latency`, as defined by Orca, is from arrival to last
    token divided by the number of tokens.

    Args:
        requests: lengths and arrivals.
        token_times: for each request, when its tokens came: seconds from the workload's beginning.
    """
    pairs = list(zip(requests, token_times, strict=True))
    samples = {
        "ttft": [times[0] - request.arrival_seconds for request, times in pairs],
        "time_per_token": np.concatenate([np.diff(times) for _, times in pairs]),
        "normalized_latency": [
            (times[-1] - request.arrival_seconds) / len(times) for request, times in pairs
        ],
    }
    return {
        f"{name}_p{percent}": float(np.percentile(values, percent)) if len(values) else None
        for name, values in samples.items()
        for percent in (50, 99)
    }


def rates(requests: Sequence[Request], seconds: float) -> dict[str, float]:
    """Queries and output tokens per second."""
    return {
        "seconds": seconds,
        "queries_per_second": len(requests) / seconds,
        "output_tokens_per_second": sum(r.output_tokens for r in requests) / seconds,
    }


class PeakMemory:
    """The peak memory of this process and of the children that it starts within the block, minus
    what it held before; `bytes` is None where the kernel does not report it.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before = 0
        # Other engines are children too, but are not part of what is measured.
        self._others: set[str] = set()

    def __enter__(self) -> PeakMemory:
        gc.collect()
        # Memory that earlier runs left free in the allocator would hide what this one takes.
        ctypes.CDLL(None).malloc_trim(0)
        try:
            # "5" resets the peak (VmHWM) to what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status_bytes("self", "VmRSS")
            self._others = _children()
        except OSError:
            self._before = 0
        return self

    def read(self) -> None:
        """Must be called while the children are still alive."""
        if not self._before:
            return
        peak = _status_bytes("self", "VmHWM") - self._before
        self.bytes = peak + sum(_status_bytes(pid, "VmHWM") for pid in _children() - self._others)

    def __exit__(self, *_: object) -> None:
        pass


def run_relay(
    make: Callable[[], Any],
    jobs: Sequence[Job],
    *,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], object] = time.sleep,
) -> Run:
    """Serves the jobs with a new relay, which is warmed up before the timing begins.

    Args:
        make: returns the relay.
        jobs: in order of arrival.
        clock, sleep: seconds.
    """
    with PeakMemory() as memory, make() as relay:
        # A query arrives while another decodes, so that workers that prefill elsewhere get one too.
        for count in (4, 2):
            relay.submit(jobs[0].token_ids[:16], max_new_tokens=count, eos=None)
            relay.step()
        relay.run()
        relay.reset_counters()
        begin = clock()
        queries, loaded = _drive(relay, jobs, begin, clock, sleep)
        seconds = clock() - begin
        memory.read()
        summary = relay.summary()
        spans = [
            [span.slot, span.query_id, span.begin - begin, span.end - begin, span.kind]
            for span in relay.timeline
        ]
    first = queries[0].id
    for span in spans:
        span[1] -= first
    requests = [job.request for job in jobs]
    times = [[at - begin for at in query.token_times] for query in queries]
    figures = {
        **rates(requests, seconds),
        **latencies(requests, times),
        "slot_idle": summary["slot_idle"],
        "slot_idle_loaded": loaded,
        "slot_prefilling": summary["slot_prefilling"],
        "prefill_stall": summary["prefill_stall"],
        "joint_padding": summary["joint_padding"],
        "cache_padding_read": summary["cache_padding_read"],
        "steps": summary["steps"],
        "replayed_steps": summary["replayed_steps"],
        "rows_per_step": summary["active_slot_steps"] / max(1, summary["steps"]),
        "shaping_bytes": summary["shaping_bytes"],
        "joint_share": summary["joint_seconds"] / seconds,
        "peak_kv_bytes": summary["peak_kv_bytes"],
        "peak_bytes": memory.bytes,
    }
    return Run([list(query.result()) for query in queries], figures, spans)


def _drive(
    relay: Any,
    jobs: Sequence[Job],
    begin: float,
    clock: Callable[[], float],
    sleep: Callable[[float], object],
) -> tuple[list[Any], float | None]:
    """The queries, and `slot_idle` of the steps before and after which queries waited."""
    pending, queries = deque(jobs), []
    slot_steps = active = 0
    more = True
    while pending or more:
        now = clock() - begin
        while pending and pending[0].request.arrival_seconds <= now:
            job = pending.popleft()
            queries.append(
                # Every system has to compute the same number of tokens, even if the model would end
                # earlier.
                relay.submit(job.token_ids, max_new_tokens=job.request.output_tokens, eos=None)
            )
        # A policy that forms batches may wait for those queries.
        relay.more_to_come = bool(pending)
        waited = bool(relay.waiting)
        before = relay.counters.slot_steps, relay.counters.active_slot_steps
        more = relay.step()
        if waited and relay.waiting:
            slot_steps += relay.counters.slot_steps - before[0]
            active += relay.counters.active_slot_steps - before[1]
        if not more and pending:
            sleep(max(0.0, begin + pending[0].request.arrival_seconds - clock()))
    return queries, 1 - active / slot_steps if slot_steps else None


def _children() -> set[str]:
    lists = Path("/proc/self/task").glob("*/children")
    return {pid for children in lists for pid in children.read_text().split()}


def _status_bytes(process: str, field: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{process}/status has no {field}")
