"""Prefill by other processes, which hand keys and values over in shared memory.

The model is handed over once, as `torch.save` writes it, in an anonymous file that every worker
maps, so all workers read one copy of the weights. A worker that dies or takes too long is killed
and restarted, and its prompts are computed once more; if that fails too, they are left to the loop.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..llama.handle import ModelHandle
from .base import Prefilled, Prefiller, Worker
from .handover import Handover, Sizes

_log = logging.getLogger(__name__)

# A worker that has failed to start this many times in a row is given up.
_MAX_FAILED_STARTS = 3
MAX_MESSAGE_BYTES = 1 << 16


class WorkerLostError(RuntimeError):
    """A worker process ended, or was killed because it did not answer in time."""


class Apart(Prefiller):
    """Processes; see `Prefiller`.

    Args:
        workers: the number of processes.
        threads, always: see `Prefiller`.
        timeout: seconds that a forward may take; after that the process is killed.
        start_timeout: seconds within which a process must be ready.

    Raises:
        ValueError: workers or threads is below 1, or a timeout is not above 0.
        NotImplementedError: the system is not Linux, or, when a relay starts it, the model is not
            on the CPU.
    """

    name = "apart"

    def __init__(
        self,
        workers: int = 1,
        threads: int | None = None,
        always: bool = False,
        *,
        timeout: float = 120.0,
        start_timeout: float = 120.0,
    ):
        super().__init__(workers, threads, always)
        if not hasattr(os, "memfd_create"):
            raise NotImplementedError(f"Apart: system must be Linux, got {sys.platform}")
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not seconds > 0:
                raise ValueError(f"Apart: {name} must be > 0 seconds, got {seconds}")
        self.timeout = timeout
        self.start_timeout = start_timeout
        self._workers: list[_ProcessWorker] = []

    def make_workers(self, model: ModelHandle, threads: int) -> list[Worker]:
        """One worker per process, all on one copy of the model's weights."""
        device = torch.device(getattr(model, "device", "cpu"))
        if device.type != "cpu":
            # The processes share host memory: each would put its own weights on the GPU, and
            # keys and values would cross to the host and back.
            raise NotImplementedError(
                f"Apart: model must be on the CPU, got one on {device}: use prefill='overlapped' "
                "or 'serial' there"
            )
        weights = _ModelFile(model)
        timeouts = (self.timeout, self.start_timeout)
        self._workers = [
            _ProcessWorker(weights, threads, *timeouts) for _ in range(self.num_workers)
        ]
        return list(self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the live workers."""
        links = [worker.link for worker in self._workers]
        return [link.process.pid for link in links if link is not None]


class _ModelFile:
    """A model in an anonymous file, which vanishes with the last process that has it open."""

    def __init__(self, model: ModelHandle):
        self.sizes = Sizes.of(model)
        self.file = os.memfd_create("baton-model")
        self._is_open = True
        try:
            with open(self.file, "wb", closefd=False) as stream:
                torch.save(model, stream)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self.file)


class _Link(NamedTuple):
    """A process, and our end of the socket to it."""

    process: subprocess.Popen
    socket: socket.socket


class _ProcessWorker(Worker):
    def __init__(self, model: _ModelFile, threads: int, timeout: float, start_timeout: float):
        self._model = model
        self._threads = threads
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._failed_starts = 0
        self._stopped = False
        self.link: _Link | None = None

    def start(self) -> None:
        self._start()

    def _start(self) -> _Link:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {
            **os.environ,
            # The worker must be able to import everything that this process can.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        # Spinning threads of torch would take cores from the loop.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        command = [sys.executable, "-m", "baton_engines.prefill.apart_worker"]
        numbers = (theirs.fileno(), self._model.file, self._threads)
        with theirs:
            # A separate session: Ctrl-C in the terminal is meant for this process only, and a
            # worker notices by the end of its socket that its parent is gone. Its output is not a
            # result.
            try:
                process = subprocess.Popen(
                    [*command, *map(str, numbers)],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=numbers[:2],
                    start_new_session=True,
                )
            except BaseException:
                ours.close()
                raise
        self.link = link = _Link(process, ours)
        if self._stopped:
            self.stop()
        try:
            answer = self._receive(link, self._start_timeout)
        except WorkerLostError:
            self._end_process()
            self._failed_starts += 1
            raise
        if "error" in answer:
            self._end_process()
            self._failed_starts += 1
            raise RuntimeError(f"Apart: worker process must start, got {answer['error']}")
        self._failed_starts = 0
        return link

    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        try:
            return self._ask(prompts)
        except WorkerLostError as error:
            if self._stopped:
                raise
            # Logged as text: the error holds frames, and they hold memory.
            _log.warning("%s; its prompts are computed again", str(error))
        return self._ask(prompts)

    def stop(self) -> None:
        self._stopped = True
        link = self.link
        if link is not None:
            link.process.kill()

    def close(self) -> None:
        self._end_process()
        self._model.close()

    def _ask(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        link = self.link
        if link is None:
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise WorkerLostError(
                    f"Apart: worker process could not be started {_MAX_FAILED_STARTS} times"
                )
            link = self._start()
        lengths = [len(prompt) for prompt in prompts]
        file = os.memfd_create("baton-prefill")
        try:
            handover = Handover(file, self._model.sizes, lengths, create=True)
            handover.tokens.copy_(torch.tensor([token for prompt in prompts for token in prompt]))
            message = json.dumps({"lengths": lengths}).encode()
            try:
                socket.send_fds(link.socket, [message], [file])
                answer = self._receive(link, self._timeout)
            except OSError as error:
                self._end_process()
                raise WorkerLostError(f"Apart: worker process was lost, {error!r}") from error
            except WorkerLostError:
                self._end_process()
                raise
        finally:
            os.close(file)
        if "error" in answer:
            raise RuntimeError(f"Apart: worker process raised {answer['error']}")
        return Prefilled(handover.rows(), handover.logits)

    @staticmethod
    def _receive(link: _Link, timeout: float) -> dict:
        link.socket.settimeout(timeout)
        try:
            data = link.socket.recv(MAX_MESSAGE_BYTES)
        except TimeoutError as error:
            raise WorkerLostError(
                f"Apart: worker process {link.process.pid} must answer within {timeout} s"
            ) from error
        except OSError as error:
            raise WorkerLostError(f"Apart: worker process was lost, {error!r}") from error
        if not data:
            raise WorkerLostError(f"Apart: worker process {link.process.pid} ended")
        return json.loads(data)

    def _end_process(self) -> None:
        link, self.link = self.link, None
        if link is not None:
            link.process.send_signal(signal.SIGKILL)
            link.process.wait()
            link.socket.close()
