"""Prefill by a thread of this process while the decode loop goes on.

CPU: the thread has an OpenMP team of its own, of as many cores as it is given. CUDA: it has a
stream of its own, and a job is done when the stream is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import Prefilled, Prefiller, Worker, compute


class Overlapped(Prefiller):
    """Threads of this process; see `Prefiller`. A forward that hangs cannot be taken back."""

    name = "overlapped"

    def make_workers(self, model, threads: int) -> list[Worker]:
        """One thread's worker each, on the model's own weights."""
        return [_ThreadWorker(model.twin(), threads) for _ in range(self.num_workers)]


class _ThreadWorker(Worker):
    def __init__(self, model, threads: int):
        self._model = model
        self._threads = threads
        device = torch.device(getattr(model, "device", "cpu"))
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # What the loop's thread enqueues later, the insertion, reads the keys and values.
        self._reader = torch.cuda.current_stream(device) if self._stream is not None else None

    def start(self) -> None:
        # For this thread alone: each thread that calls OpenMP has a team of its own. In a new
        # thread torch's first look at the number replaces it by the one that was last set anywhere,
        # so there must have been a look before.
        torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        if self._stream is None:
            return compute(self._model, prompts)
        with torch.cuda.stream(self._stream):
            prefilled = compute(self._model, prompts)
        for tensor in (prefilled.logits, *(part for row in prefilled.rows for part in row)):
            # Not to be given out again before the reader has read it.
            tensor.record_stream(self._reader)
        self._stream.synchronize()
        return prefilled

    def close(self) -> None:
        self._model = None
