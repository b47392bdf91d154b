"""Cases of the study: a system and a workload, given by name, so that any process can run them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from baton_engines import policies

from ...workloads import Request, at_once, azure, orca, poisson
from .costs import Roofline, roofline
from .result import Result
from .system import System, simulate

REQUESTS = 400


@dataclass(frozen=True)
class Case:
    """One system on one workload.

    Attributes:
        policy: its name.
        slots: rows of a decode device.
        options: of the policy, as pairs.
        device, model: of the roofline.
        machine: more options of `Roofline`, as pairs.
        workload: "orca", "conv" or "code"; at full length.
        rate: requests per second, Poisson; None for all at once.
        prompt_scale: factor of the prompts' lengths.
        prefill, decoders, prefillers, shape, overlap: of `System`.
        bounded: whether keys and values have to fit the device's memory.
    """

    policy: str
    slots: int
    options: tuple[tuple[str, object], ...] = ()
    device: str = "A100-80G"
    model: str = "llama-7b"
    machine: tuple[tuple[str, object], ...] = ()
    workload: str = "orca"
    rate: float | None = None
    prompt_scale: float = 1.0
    prefill: str = "serial"
    decoders: int = 1
    prefillers: int = 0
    shape: str = "ragged"
    overlap: float = 0.5
    bounded: bool = True

    def cost(self) -> Roofline:
        """The machine."""
        return roofline(self.device, self.model, **dict(self.machine))

    def requests(self) -> list[Request]:
        """The workload; its lengths depend only on its name and scale."""
        requests = (
            orca(REQUESTS) if self.workload == "orca" else at_once(azure(self.workload, REQUESTS))
        )
        if self.prompt_scale != 1:
            requests = [
                replace(r, prompt_tokens=max(1, round(self.prompt_scale * r.prompt_tokens)))
                for r in requests
            ]
        return requests if self.rate is None else poisson(requests, self.rate)

    def system(self) -> System:
        """The machines and what runs on them."""
        cost = self.cost()
        # Enough that one is ready when a row becomes free, but few, because a prefilled query waits
        # after its first token.
        lookahead = max(2, self.slots // 4)
        return System(
            cost,
            partial(policies.get, self.policy, **dict(self.options)),
            self.slots,
            self.prefill,
            decoders=self.decoders,
            prefillers=self.prefillers,
            transfer=cost.transfer,
            lookahead=lookahead,
            shape=self.shape,
            kv_budget=int(cost.kv_bytes) if self.bounded else None,
            overlap=self.overlap,
            devices_each=cost.parallel,
        )


def run_case(case: Case) -> Result:
    """Simulates a case."""
    return simulate(case.system(), case.requests())


@dataclass(frozen=True)
class Goodput:
    """The most requests per second and device that a system serves within bounds.

    Attributes:
        case: the system and workload; its rate is sought.
        ttft: bound of the p99 of the time to first token, seconds.
        gap: bound of the p99 of the time per token, seconds.
    """

    case: Case
    ttft: float
    gap: float

    def holds(self, rate: float) -> bool:
        """Whether the bounds hold at that rate."""
        result = run_case(replace(self.case, rate=rate))
        return result.ttft_percentile(99) <= self.ttft and result.gap_percentile(99) <= self.gap


def run_goodput(sought: Goodput) -> float:
    """Finds the rate by bisection to 2 %; 0 if the bounds hold at no rate."""
    low, high = 0.0, 0.125
    while sought.holds(high) and high < 1000:
        low, high = high, 2 * high
    while high - low > 0.02 * high and high > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if sought.holds(middle) else (low, middle)
    return low / sought.case.system().num_devices


def run_all(jobs: Iterable[Case | Goodput], processes: int) -> dict[Case | Goodput, object]:
    """Runs every distinct job once, in several processes; results do not depend on their number."""
    distinct = list(dict.fromkeys(jobs))
    if processes == 1:
        return dict(zip(distinct, map(_run, distinct), strict=True))
    # A forked process shares the loaded modules, so nothing has to be passed to it.
    with get_context("fork").Pool(processes) as pool:
        return dict(zip(distinct, pool.map(_run, distinct, chunksize=1), strict=True))


def _run(job: Case | Goodput) -> object:
    return run_case(job) if isinstance(job, Case) else run_goodput(job)
