"""Prefill in the decode loop itself, between two steps: this prefiller computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

from ..llama.handle import ModelHandle
from .base import Job, Prefiller, Worker


class Serial(Prefiller):
    """Computes nothing elsewhere; see `Prefiller`. It has no workers and gets no jobs."""

    name = "serial"

    def __init__(self) -> None:
        super().__init__()
        self.num_workers = 0

    def make_workers(self, model: ModelHandle, threads: int) -> list[Worker]:
        """None."""
        return []

    def open(self, model: ModelHandle) -> None:
        """Starts nothing."""

    def submit(self, job: Job) -> None:
        """Rejects the job, which would never end."""
        raise RuntimeError("Serial.submit: prompts must be computed by the loop, got a job")

    def wait(self, jobs: Sequence[Job], timeout: float | None = None) -> None:
        """There is nothing to wait for."""

    def close(self) -> None:
        """Nothing was started."""
