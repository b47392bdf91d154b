"""Simulated time that advances by events, and devices that jobs share.

This needs only a heap and forty lines instead of a simulation library. Ties are resolved in the
order of entry, so that a run can be repeated bit for bit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

from .costs import Cost


class Events:
    """The queue of future events.

    Attributes:
        now: simulated seconds.
    """

    def __init__(self):
        self.now = 0.0
        self._heap: list[tuple[float, bool, int, Callable[[], object]]] = []
        self._order = count()

    def at(self, time: float, action: Callable[[], object], *, late: bool = False) -> None:
        """Calls `action` at that time; `late`: after everything else that happens then."""
        heapq.heappush(self._heap, (time, late, next(self._order), action))

    def run(self) -> None:
        """Runs until no event is left."""
        while self._heap:
            self.now, _, _, action = heapq.heappop(self._heap)
            action()


class SharedDevice:
    """A device with any number of concurrent jobs, all slowed down equally.

    Ideally, jobs that together need more than the whole arithmetic rate or bandwidth run at the
    rate at which the scarcer of the two is fully used: sharing hides one job's memory accesses
    behind another's arithmetic, but creates no more of either. In the worst case they take turns.

    `slowdown = jobs - overlap x (jobs - max(1, sum of compute shares, sum of memory shares))`

    Args:
        events: the clock.
        overlap: 1 for the ideal, 0 for turns.

    Attributes:
        busy_seconds: time in which at least one job ran.
    """

    def __init__(self, events: Events, overlap: float):
        if not 0 <= overlap <= 1:
            raise ValueError(f"SharedDevice: overlap must be from 0 to 1, got {overlap}")
        self.busy_seconds = 0.0
        self._events = events
        self._overlap = overlap
        self._jobs: list[_Job] = []
        self._since = 0.0
        self._version = 0

    def start(self, cost: Cost, done: Callable[[], object]) -> None:
        """Runs a job of that cost, then calls `done`."""
        self._advance()
        self._jobs.append(_Job(cost, done))
        self._schedule()

    def _rate(self) -> float:
        number = len(self._jobs)
        if number == 1:
            return 1.0
        compute = sum(job.cost.compute for job in self._jobs)
        memory = sum(job.cost.memory for job in self._jobs)
        ideal = max(1.0, compute, memory)
        return 1.0 / (number - self._overlap * (number - ideal))

    def _advance(self) -> None:
        now = self._events.now
        if self._jobs:
            self.busy_seconds += now - self._since
            done = (now - self._since) * self._rate()
            for job in self._jobs:
                job.seconds_left -= done
        self._since = now

    def _schedule(self) -> None:
        # An event that was scheduled for a former set of jobs has an outdated version.
        self._version += 1
        version = self._version
        first = min(self._jobs, key=lambda job: job.seconds_left)
        # Because of rounding, a job that is due may have a negative rest.
        wait = max(0.0, first.seconds_left) / self._rate()
        self._events.at(self._events.now + wait, lambda: self._finish(first, version))

    def _finish(self, job: _Job, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        self._jobs.remove(job)
        if self._jobs:
            self._schedule()
        job.done()


class _Job:
    def __init__(self, cost: Cost, done: Callable[[], object]):
        self.cost = cost
        self.done = done
        self.seconds_left = cost.seconds
