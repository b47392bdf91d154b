"""Prefill by processes of their own, which hand keys and values over in shared memory.

The model travels once, as `torch.save` writes it, in a file without a name that every worker maps,
so all workers read one copy of the weights. A worker that dies, or that takes too long, is killed
and started again, and its prompts are computed once more; the second time they are left to the
loop.
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

import torch

from .base import Prefilled, Prefiller, Worker
from .handover import Handover, Sizes

_log = logging.getLogger(__name__)

# A worker that could not be started so many times in a row is not tried again.
_MAX_FAILED_STARTS = 3
MAX_MESSAGE_BYTES = 1 << 16


class WorkerLostError(RuntimeError):
    """A worker process ended, or was killed because it did not answer in time."""


class Apart(Prefiller):
    """Processes; see `Prefiller`.

    Args:
        workers: processes.
        threads, always: see `Prefiller`.
        timeout: seconds that a forward may take; after them the process is killed.
        start_timeout: seconds until a process must be ready.

    Raises:
        ValueError: workers or threads is below 1, or a timeout is not above 0.
        NotImplementedError: on another system than Linux, or, when a relay starts it, for a model
            that is not on the CPU.
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

    def make_workers(self, model, threads: int) -> list[Worker]:
        """One process's worker each, on one copy of the model's weights."""
        device = torch.device(getattr(model, "device", "cpu"))
        if device.type != "cpu":
            # The processes share host memory: each would put weights of its own on the GPU, and
            # keys and values would cross to the host and back.
            raise NotImplementedError(
                f"Apart: model must be on the CPU, got one on {device}: use prefill='overlapped' "
                "or 'serial' there"
            )
        weights = _ModelFile(model)
        timeouts = (self.timeout, self.start_timeout)
        return [_ProcessWorker(weights, threads, *timeouts) for _ in range(self.num_workers)]

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that live."""
        workers = self._desk.workers if self._desk is not None else ()
        return [worker.process.pid for worker in workers if worker.process is not None]


class _ModelFile:
    """A model in an anonymous file, which is gone with the last process that has it open."""

    def __init__(self, model):
        self.sizes = Sizes.of(model)
        self.file = os.memfd_create("baton-model")
        try:
            with open(self.file, "wb", closefd=False) as stream:
                torch.save(model, stream)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
            self.file = None


class _ProcessWorker(Worker):
    def __init__(self, model: _ModelFile, threads: int, timeout: float, start_timeout: float):
        self._model = model
        self._threads = threads
        self._timeout = timeout
        self._start_timeout = start_timeout
        self._failed_starts = 0
        self._stopped = False
        self._socket: socket.socket | None = None
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        environment = {
            **os.environ,
            # What this process can import, the other one must.
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        }
        # Those of torch's threads that spin would take the loop's cores.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        command = [sys.executable, "-m", "baton_engines.prefill.apart_worker"]
        numbers = (theirs.fileno(), self._model.file, self._threads)
        with theirs:
            # A session of its own: a Ctrl-C at the terminal is for this process alone, and a worker
            # whose parent is gone sees it by the end of its socket. What it prints is no result.
            self.process = subprocess.Popen(
                [*command, *map(str, numbers)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=numbers[:2],
                start_new_session=True,
            )
        if self._stopped:
            self.stop()
        try:
            answer = self._receive(self._start_timeout)
        except WorkerLostError:
            self._end_process()
            self._failed_starts += 1
            raise
        if "error" in answer:
            self._end_process()
            self._failed_starts += 1
            raise RuntimeError(f"Apart: worker process must start, got {answer['error']}")
        self._failed_starts = 0

    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        try:
            return self._ask(prompts)
        except WorkerLostError as error:
            if self._stopped:
                raise
            # As text: the error holds frames, and they hold memory.
            _log.warning("%s; its prompts are computed again", str(error))
        return self._ask(prompts)

    def stop(self) -> None:
        self._stopped = True
        process = self.process
        if process is not None:
            process.kill()

    def close(self) -> None:
        self._end_process()
        self._model.close()

    def _ask(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        if self.process is None:
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise WorkerLostError(
                    f"Apart: worker process could not be started {_MAX_FAILED_STARTS} times"
                )
            self.start()
        lengths = [len(prompt) for prompt in prompts]
        file = os.memfd_create("baton-prefill")
        try:
            handover = Handover(file, self._model.sizes, lengths, create=True)
            handover.tokens.copy_(torch.tensor([token for prompt in prompts for token in prompt]))
            message = json.dumps({"lengths": lengths}).encode()
            try:
                socket.send_fds(self._socket, [message], [file])
                answer = self._receive(self._timeout)
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

    def _receive(self, timeout: float) -> dict:
        self._socket.settimeout(timeout)
        try:
            data = self._socket.recv(MAX_MESSAGE_BYTES)
        except TimeoutError as error:
            raise WorkerLostError(
                f"Apart: worker process {self.process.pid} must answer within {timeout} s"
            ) from error
        except OSError as error:
            raise WorkerLostError(f"Apart: worker process was lost, {error!r}") from error
        if not data:
            raise WorkerLostError(f"Apart: worker process {self.process.pid} ended")
        return json.loads(data)

    def _end_process(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        if self._socket is not None:
            self._socket.close()
            self._socket = None
