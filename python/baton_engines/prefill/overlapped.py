"""Prefill by a thread of this process while the decode loop goes on.

On the CPU, the thread has its own OpenMP team with the cores that it is given. With CUDA, it has
its own stream, and a job is done when the stream is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..llama.handle import ModelHandle
from .base import Prefilled, Prefiller, Worker, compute


class Overlapped(Prefiller):
    """Threads of this process; see `Prefiller`. A forward that hangs cannot be stopped."""

    name = "overlapped"

    def make_workers(self, model: ModelHandle, threads: int) -> list[Worker]:
        """One worker per thread, all on the model's own weights."""
        return [_ThreadWorker(model.twin(), threads) for _ in range(self.num_workers)]


class _ThreadWorker(Worker):
    def __init__(self, model: ModelHandle, threads: int):
        self._model = model
        self._threads = threads
        device = torch.device(getattr(model, "device", "cpu"))
        # The worker's stream, and the stream in which the loop's thread will later enqueue the
        # insertion, which reads the keys and values.
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def start(self) -> None:
        # Affects this thread only, because each thread that calls OpenMP has its own team. In a new
        # thread, torch's first read of the number replaces it by the one that was last set
        # anywhere, so a read must come before.
        torch.get_num_threads()
        torch.set_num_threads(self._threads)

    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        if self._streams is None:
            return compute(self._model, prompts)
        own, reader = self._streams
        with torch.cuda.stream(own):
            prefilled = compute(self._model, prompts)
        for tensor in (prefilled.logits, *(part for row in prefilled.rows for part in row)):
            # The memory must not be reused before the reading stream has used it.
            tensor.record_stream(reader)
        own.synchronize()
        return prefilled
