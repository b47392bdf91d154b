"""Clocks for a comparison in turns, and the CPU time that other programs used meanwhile."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_STAT = Path("/proc/stat")
# Columns of the first line of /proc/stat: user nice system idle iowait irq softirq steal.
_IDLE = (3, 4)
_NUM_FIELDS = 8


class Stopwatch:
    """A clock, in seconds, that only runs inside `running`."""

    def __init__(self) -> None:
        self._past = 0.0
        self._since: float | None = None

    def __call__(self) -> float:
        if self._since is None:
            return self._past
        return self._past + time.perf_counter() - self._since

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Lets the clock run for a block."""
        self._since = time.perf_counter()
        try:
            yield
        finally:
            self._past, self._since = self(), None


class OtherWork:
    """How much of the machine's CPU time other programs have used since this was made."""

    def __init__(self) -> None:
        self._begin = _times()

    def share(self) -> float | None:
        """The share from 0 to 1 of all CPUs; None where the system does not report it."""
        begin, end = self._begin, _times()
        if begin is None or end is None:
            return None
        total, busy, own = (after - before for before, after in zip(begin, end, strict=True))
        return max(0.0, busy - own) / total if total > 0 else None


def _times() -> tuple[float, float, float] | None:
    """Seconds of CPU time: of all CPUs, of those that are not idle, and of this process."""
    try:
        fields = [float(field) for field in _STAT.read_text().split()[1 : _NUM_FIELDS + 1]]
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    total = sum(fields) / ticks
    idle = sum(fields[index] for index in _IDLE) / ticks
    return total, total - idle, sum(os.times()[:4])
