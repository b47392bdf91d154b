"""The simulation compared with the relay on this machine: predicted and measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from baton_engines import policies
from baton_engines.relay import Relay

from ...workloads import Request, longest, orca, poisson
from .costs import CostModel
from .measured import Measured, drift
from .result import Result
from .system import System, simulate


class SkippingClock:
    """A clock on which waiting takes no time: it is set forward to the next arrival.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._offset = -clock()

    def __call__(self) -> float:
        """Seconds since its creation, including all that was skipped."""
        return self._clock() + self._offset

    def skip_to(self, seconds: float) -> None:
        """Advances to that time, unless it is already later."""
        self._offset += max(0.0, seconds - self())


@dataclass(frozen=True)
class Measurement:
    """Measurements of the relay; the names have the meanings of `Result`."""

    tokens_per_second: float
    gaps: np.ndarray
    ttft: np.ndarray
    steps: int
    slot_idle: float
    prefill_stall: float

    def gap_percentile(self, percent: float) -> float:
        """Seconds between two tokens that `percent` of them do not exceed."""
        return float(np.percentile(self.gaps, percent, method="inverted_cdf"))

    def ttft_percentile(self, percent: float) -> float:
        """Seconds to the first token that `percent` of the queries do not exceed."""
        return float(np.percentile(self.ttft, percent, method="inverted_cdf"))


def measure(
    model: Any,
    policy: policies.Policy,
    requests: Sequence[Request],
    num_slots: int,
    clock: SkippingClock,
) -> Measurement:
    """Serves the requests with the relay.

    Args:
        model: a `PatchedLlama`, or a stand-in for one.
        policy: plans.
        requests: in order of arrival; their tokens are arbitrary, their lengths exact.
        num_slots: of the relay.
        clock: of the relay.

    Raises:
        RuntimeError: a query did not finish.
    """
    generator = torch.Generator().manual_seed(0)
    pending = list(enumerate(requests))
    queries = []
    with Relay(model, num_slots, longest(requests), policy, clock=clock) as relay:
        more = True
        while more or pending:
            if not more:
                clock.skip_to(pending[0][1].arrival_seconds)
            now = clock()
            while pending and pending[0][1].arrival_seconds <= now:
                _, request = pending.pop(0)
                ids = torch.randint(model.vocab_size, (request.prompt_tokens,), generator=generator)
                query = relay.submit(ids, max_new_tokens=request.output_tokens, eos=None)
                # It has waited since its arrival, not only since the step that was running then.
                query.submitted = request.arrival_seconds
                queries.append(query)
            relay.more_to_come = bool(pending)
            more = relay.step()
        counters = relay.counters
    failed = [query for query in queries if query.status != "finished"]
    if failed:
        raise RuntimeError(f"measure: all queries must finish, got {failed[0].error!r}")
    seconds = max(query.finished for query in queries) - requests[0].arrival_seconds
    return Measurement(
        tokens_per_second=counters.output_tokens / seconds,
        gaps=np.concatenate([np.diff(np.array(query.token_times)) for query in queries]),
        ttft=np.array([query.first_token - query.submitted for query in queries]),
        steps=counters.steps,
        slot_idle=counters.slot_idle,
        prefill_stall=counters.stalled_slot_seconds / (num_slots * seconds),
    )


@dataclass(frozen=True)
class Case:
    """One policy on one workload, predicted and measured.

    Attributes:
        drift: factor of the prediction's costs: how much slower the machine was around the
            measurement than at calibration.
    """

    policy: str
    workload: str
    drift: float
    predicted: Result
    measured: Measurement

    def errors(self) -> dict[str, float]:
        """Relative errors of the prediction."""
        predicted, measured = self.predicted, self.measured
        return {
            "tokens_per_second": predicted.tokens_per_second / measured.tokens_per_second - 1,
            "gap_p50": predicted.gap_percentile(50) / measured.gap_percentile(50) - 1,
            "gap_p99": predicted.gap_percentile(99) / measured.gap_percentile(99) - 1,
        }


def small_workloads(cost: CostModel, count: int, num_slots: int) -> dict[str, list[Request]]:
    """Orca's lengths divided by 4: all at once, and arriving at four fifths of the rate served."""
    at_once = orca(count, divisor=4)
    served = simulate(System(cost, lambda: policies.get("baton"), num_slots), at_once)
    rate = 0.8 * served.queries / served.seconds
    return {"at once": at_once, "Poisson": poisson(at_once, rate)}


def validate(
    model: Any,
    cost: Measured,
    *,
    count: int = 24,
    num_slots: int = 8,
    clock: Callable[[], float] = time.perf_counter,
    report: Callable[[Case], object] = lambda case: None,
) -> list[Case]:
    """Predicts and measures every policy on small workloads.

    Machines get slower and faster while others use them. So a few forwards are timed right before
    and after each measurement, and the prediction is for the machine in that state.

    Args:
        model: a `PatchedLlama`.
        cost: fitted to it.
        count: requests.
        num_slots: of the relay.
        clock: seconds.
        report: called with every case.
    """
    cases = []
    for workload, requests in small_workloads(cost, count, num_slots).items():
        bounds = {"max_rows": num_slots, "max_length": longest(requests), "clock": clock}
        after = drift(model, cost, **bounds)
        for name in policies.NAMES:
            before = after
            measured = measure(model, policies.get(name), requests, num_slots, SkippingClock(clock))
            after = drift(model, cost, **bounds)
            factor = (before + after) / 2
            system = System(cost.slower(factor), partial(policies.get, name), num_slots)
            predicted = simulate(system, requests)
            cases.append(Case(name, workload, factor, predicted, measured))
            report(cases[-1])
    return cases


_COLUMNS = (
    ("output tokens/s", "tokens_per_second", lambda run: run.tokens_per_second, "{:.1f}"),
    ("time per token p50 (ms)", "gap_p50", lambda run: 1e3 * run.gap_percentile(50), "{:.0f}"),
    ("p99 (ms)", "gap_p99", lambda run: 1e3 * run.gap_percentile(99), "{:.0f}"),
)


def print_case(case: Case) -> None:
    """One line: predicted, measured, error, for rate and latencies."""
    errors = case.errors()
    cells = [f"{case.workload:<8} {case.policy:<18}"]
    for label, name, value, form in _COLUMNS:
        predicted, measured = form.format(value(case.predicted)), form.format(value(case.measured))
        cells.append(f"{label} {predicted:>5} for {measured:>5} {errors[name]:+7.1%}")
    cells.append(f"steps {case.predicted.steps} for {case.measured.steps}")
    cells.append(f"drift {case.drift:.2f}")
    print("  ".join(cells), flush=True)


def print_summary(cases: Sequence[Case]) -> None:
    """The errors over all cases, and those of the ratios between policies."""
    print("\npredicted for measured; error is predicted / measured - 1")
    for label, name, _, _ in _COLUMNS:
        errors = [abs(case.errors()[name]) for case in cases]
        print(f"{label:<24} error: median {np.median(errors):.1%}, largest {max(errors):.1%}")
    ratios = []
    for workload in dict.fromkeys(case.workload for case in cases):
        group = {case.policy: case for case in cases if case.workload == workload}
        predicted, measured = (
            group["baton"].predicted.tokens_per_second / group["orca"].predicted.tokens_per_second,
            group["baton"].measured.tokens_per_second / group["orca"].measured.tokens_per_second,
        )
        ratios.append(f"{workload}: {predicted:.3f} for {measured:.3f}")
    print("baton / orca, output tokens/s: " + "; ".join(ratios))
