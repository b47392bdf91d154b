"""Computes prompts outside the decode loop: jobs, their threads, and what a mode has to implement.

One thread per worker takes jobs first in, first out. The outcome is stored in the job instead of
sent as a message, so a Ctrl-C in the loop's thread cannot lose it. The workers do not touch the
relay's cache: keys and values of a job lie in separate memory until the loop inserts them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..llama.handle import ModelHandle
from ..llama.packed_batch import PackedBatch


class Prefilled(NamedTuple):
    """Computed prompts.

    Attributes:
        rows: key and value of every prompt, `[num_layers, tokens, num_kv_heads, head_dim]`, last
            dimension contiguous.
        logits: float32 `[prompts, vocab]`, after the last token of every prompt.
    """

    rows: Sequence[tuple[torch.Tensor, torch.Tensor]]
    logits: torch.Tensor


class Job:
    """Prompts that are computed in one forward.

    Attributes:
        prompts: token ids of every prompt.
        started: whether a worker is computing it, or has.
        abandoned: whether it is not needed any more; set by the loop, and it is then not computed.
        prefilled, error: the outcome; one of them is set before `done`.
        done: whether it has ended.
    """

    def __init__(self, prompts: Sequence[Sequence[int]]):
        self.prompts = prompts
        self.started = False
        self.abandoned = False
        self.prefilled: Prefilled | None = None
        self.error: BaseException | None = None
        self.done = False


class Worker(ABC):
    """Computes one job at a time. `start` and `compute` are called from a separate thread."""

    @abstractmethod
    def start(self) -> None:
        """Prepare for work; `Prefiller.open` passes its exceptions on."""

    @abstractmethod
    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        """The prompts' keys, values and last logits; an exception ends only this job."""

    def stop(self) -> None:  # noqa: B027
        """Called from another thread before the worker is closed: end `compute` early, if
        possible."""

    def close(self) -> None:  # noqa: B027
        """Release everything; `compute` is not running."""


class Prefiller(ABC):
    """A way to compute prompts elsewhere. One object serves one relay.

    Args:
        workers: the number of jobs computed at a time.
        threads: CPU threads of each worker, which decoding does without meanwhile; default: half of
            torch's, divided among the workers.
        always: hand prompts over even while no query decodes. By default the loop then computes
            them itself, because no query would wait and the loop has all cores.

    Raises:
        ValueError: workers or threads is below 1.
    """

    name: str

    def __init__(self, workers: int = 1, threads: int | None = None, always: bool = False):
        for argument, count in (("workers", workers), ("threads", threads)):
            if count is not None and count < 1:
                raise ValueError(f"{type(self).__name__}: {argument} must be >= 1, got {count}")
        self.num_workers = workers
        self.threads = threads
        self.always = always
        self._desk: _Desk | None = None

    @property
    def host_threads(self) -> int:
        """The threads that an open worker takes from decoding while it computes."""
        return self.threads or 0

    @abstractmethod
    def make_workers(self, model: ModelHandle, threads: int) -> list[Worker]:
        """`num_workers` workers for a model."""

    def open(self, model: ModelHandle) -> None:
        """Start the workers.

        Raises:
            ValueError: another relay uses this object.
            Exception: what `make_workers` raises.
        """
        if self._desk is not None:
            raise ValueError(
                f"{type(self).__name__}: prefiller must belong to one relay, got one that is in use"
            )
        if self.threads is None:
            self.threads = max(1, torch.get_num_threads() // (2 * self.num_workers))
        own_threads = torch.get_num_threads()
        desk = _Desk(self.make_workers(model, self.threads))
        # A worker's `torch.set_num_threads` affects its own thread and threads created later; the
        # latter must keep the number that they would have had.
        torch.set_num_threads(own_threads)
        self._desk = desk
        # Also runs at the end of the program, and when a relay that was never closed is collected.
        self._finalizer = weakref.finalize(self, desk.close)

    def submit(self, job: Job) -> None:
        """Compute the job after those submitted before it."""
        self._open_desk().jobs.put(job)

    def wait(self, jobs: Sequence[Job], timeout: float | None = None) -> None:
        """Return when one of the jobs has ended, or after `timeout` seconds."""
        change = self._open_desk().change
        with change:
            change.wait_for(lambda: any(job.done for job in jobs), timeout)

    def close(self) -> None:
        """Stop the workers; jobs that have not ended never will."""
        if self._desk is not None:
            self._finalizer()
            self._desk = None

    def _open_desk(self) -> _Desk:
        if self._desk is None:
            raise RuntimeError(
                f"{type(self).__name__}: prefiller must be open, got one that is not"
            )
        return self._desk


class _Desk:
    """The workers' threads and what they share. Does not refer to the prefiller, which could
    otherwise never be collected."""

    def __init__(self, workers: Sequence[Worker]):
        self.jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.change = threading.Condition()
        self.workers = workers
        self._closing = False
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name="baton-prefill", daemon=True)
            for worker in workers
        ]
        self._errors: list[Exception] = []
        self._started = threading.Barrier(len(workers) + 1)
        for thread in self._threads:
            thread.start()
        try:
            self._started.wait()
            if self._errors:
                raise self._errors[0]
        except BaseException:
            self._started.abort()
            self.close()
            raise

    def close(self) -> None:
        self._closing = True
        for worker in self.workers:
            self.jobs.put(None)
            worker.stop()
        for thread in self._threads:
            thread.join()
        for worker in self.workers:
            worker.close()

    def _serve(self, worker: Worker) -> None:
        try:
            worker.start()
        except Exception as error:
            self._errors.append(error)
        # A Ctrl-C may have ended the thread on the other side.
        with contextlib.suppress(threading.BrokenBarrierError):
            self._started.wait()
        while (job := self.jobs.get()) is not None and not self._closing:
            job.started = True
            if not job.abandoned:
                try:
                    job.prefilled = worker.compute(job.prompts)
                # Any exception: the loop waits for this job, and other jobs wait for this thread.
                except BaseException as error:
                    job.error = error
            if job.abandoned:
                job.prefilled = None
            with self.change:
                job.done = True
                self.change.notify_all()
            # From here on keys and values belong to the loop.
            del job


def compute(model: ModelHandle, prompts: Sequence[Sequence[int]]) -> Prefilled:
    """Computes the prompts in one forward of `model`, with a cache that is made for them."""
    counts = [len(prompt) for prompt in prompts]
    cache = model.new_cache(len(prompts), max(counts))
    for count in counts:
        cache.allocate(count)
    device = cache.keys.device
    batch = PackedBatch.from_shape(cache.shape, range(len(prompts)), counts, device)
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    logits = model.forward(tokens, batch, cache, logits="last")
    rows = [
        (
            cache.keys[:, slot, :, :count].transpose(1, 2),
            cache.values[:, slot, :, :count].transpose(1, 2),
        )
        for slot, count in enumerate(counts)
    ]
    return Prefilled(rows, logits)
