"""Prefillers for tests: controlled by hand, or in processes with faults."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..llama.handle import ModelHandle
from ..prefill.base import Job, Prefiller, Worker, compute


class ManualPrefiller(Prefiller):
    """Computes prompts in the loop's own thread on command, so nothing depends on timing.

    Attributes:
        jobs: those that have not ended, in order.
        fault: called before a job is computed; if it raises, the job ends with that error.
    """

    name = "manual"

    def __init__(self, workers: int = 1, always: bool = False):
        super().__init__(workers, 1, always)
        self.jobs: list[Job] = []
        self.fault: Callable[[], object] = lambda: None

    def make_workers(self, model: ModelHandle, threads: int) -> list[Worker]:
        """Returns none: there are no threads."""
        return []

    def open(self, model: ModelHandle) -> None:
        """Keep the model."""
        self._model = model

    def submit(self, job: Job) -> None:
        """Remembers the job. The first jobs, one per worker, count as started."""
        self.jobs.append(job)
        self._start()

    def compute(self, count: int = 1) -> None:
        """Compute the first jobs."""
        for job in self.jobs[:count]:
            try:
                self.fault()
                prefilled = compute(self._model, job.prompts)
            except Exception as error:
                job.error = error
            else:
                job.prefilled = None if job.abandoned else prefilled
            job.done = True
        self.jobs = [job for job in self.jobs if not job.done]
        self._start()

    def wait(self, jobs: Sequence[Job], timeout: float | None = None) -> None:
        """Compute until one of them has ended."""
        while not any(job.done for job in jobs):
            self.compute()

    def close(self) -> None:
        """Forget the jobs."""
        self.jobs.clear()

    def _start(self) -> None:
        for job in self.jobs[: self.num_workers]:
            job.started = True


class ProcessFault:
    """A `FakeLlama.fault` that acts only in other processes than the one that made it, when a
    prompt begins with one of its tokens.

    Args:
        struck: a file that is written when a process hangs or pauses; after that none hangs again.
    """

    PAUSE, RAISE, DIE, HANG = 40, 41, 42, 43

    def __init__(self, struck: Path):
        self._home = os.getpid()
        self._struck = struck

    def __call__(self, rows: list[list[int]]) -> None:
        if os.getpid() == self._home:
            return
        first = {tokens[0] for tokens in rows}
        if self.RAISE in first:
            raise ArithmeticError("mine")
        if self.DIE in first:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.HANG in first and not self._struck.exists():
            self._struck.touch()
            time.sleep(1000)
        if self.PAUSE in first:
            self._struck.touch()
            time.sleep(1)
