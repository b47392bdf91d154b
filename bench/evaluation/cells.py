"""The cells of a measurement: a cell is one workload on one model, the same for all systems."""

from __future__ import annotations

from dataclasses import dataclass

from .. import workloads
from ..workloads import Request

WORKLOADS = ("orca", *workloads.AZURE)
WORKLOAD_NAMES = {
    "orca": "Orca's lengths: prompts U(32, 512), outputs U(1, 128)",
    "conv": "Azure trace 2023, conversation",
    "code": "Azure trace 2023, code completion",
}
MODELS = ("smollm2", "random-125m")
DTYPES = ("float32", "bfloat16")
ARRIVALS = ("at once", "poisson", "trace")


@dataclass(frozen=True)
class Cell:
    """One workload on one model.

    Attributes:
        workload: one of `WORKLOADS`.
        arrivals: "at once"; "poisson"; or "trace", the trace's own arrivals, compressed.
        load: with arrivals over time, their rate as a share of the queries/s that the reference
            system reaches when all are submitted at once.
        rate: requests per second, instead of a load.
        model, dtype, slots: what serves the requests.
        queries: number of requests.
        divisor: lengths are divided by it.
        repeats: runs of every system, which take turns.
        systems: names; all when empty.
        peers: whether transformers runs it too, once, and the other engines that are requested.
        group: cells of one group are drawn in one picture.
        timeline: whether the slots' history (which query held which slot when) is kept for the
            picture.
    """

    workload: str
    arrivals: str = "at once"
    load: float | None = None
    rate: float | None = None
    model: str = "smollm2"
    dtype: str = "float32"
    slots: int = 16
    queries: int = 32
    divisor: float = 1.0
    repeats: int = 1
    systems: tuple[str, ...] = ()
    peers: bool = False
    group: str = ""
    timeline: bool = False

    @property
    def title(self) -> str:
        """The cell in one line."""
        lengths = WORKLOAD_NAMES[self.workload]
        if self.divisor != 1:
            lengths += f", lengths / {self.divisor:g}"
        when = {"at once": "all at once", "poisson": "Poisson arrivals", "trace": "real arrivals"}[
            self.arrivals
        ]
        if self.rate is not None:
            when += f" at {self.rate:.2f}/s"
        elif self.load is not None:
            when += f" at {self.load:.0%} load"
        return (
            f"{lengths}; {self.queries} queries, {when}; "
            f"{self.model} in {self.dtype}, {self.slots} slots"
        )

    def at_once(self) -> list[Request]:
        """The requests, all submitted at the beginning."""
        if self.workload == "orca":
            return workloads.orca(self.queries, divisor=self.divisor)
        return workloads.at_once(workloads.azure(self.workload, self.queries, divisor=self.divisor))

    def requests(self, saturated: float | None) -> list[Request]:
        """The requests as they arrive.

        Args:
            saturated: queries/s of the reference system; a load is a share of it.
        """
        requests = self.at_once()
        if self.arrivals == "at once":
            return requests
        rate = self.rate if self.rate is not None else self.load * saturated
        if self.arrivals == "poisson":
            return workloads.poisson(requests, rate)
        real = workloads.azure(self.workload, self.queries, divisor=self.divisor)
        return workloads.azure(
            self.workload,
            self.queries,
            divisor=self.divisor,
            compression=rate / workloads.offered_rate(real),
        )

    def calibration(self) -> Cell:
        """The same requests at once, to measure what a load is a share of. Equal for equal
        requests."""
        return Cell(
            self.workload,
            model=self.model,
            dtype=self.dtype,
            slots=self.slots,
            queries=self.queries,
            divisor=self.divisor,
        )
