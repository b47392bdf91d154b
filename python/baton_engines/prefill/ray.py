"""Prefill by actors of Ray, on any node of its cluster; keys and values come through its object
store.

Ray places and restarts the actors. A prompt goes to a live, idle actor. An actor that is lost, or
that hangs and is killed, gets no prompt until Ray has restarted it. Its current prompts go to
another live actor once, or if there is none to the loop, which never waits for a restart.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import torch

from .base import Prefilled, Prefiller, Worker
from .handover import Sizes
from .ray_actor import Introduction, NamedModel, PrefillActor, SavedModel, unpack, used_isa

try:
    import ray
except ImportError as error:
    raise ImportError(
        "prefill.ray: package ray must be installed, got none: pip install 'baton_kernels[ray]'"
    ) from error

_log = logging.getLogger(__name__)


class ActorLostError(RuntimeError):
    """An actor ended, could not be reached, or was killed because it did not answer in time."""


class Remote(Prefiller):
    """Actors of Ray; see `Prefiller`.

    If the program is not connected to a cluster, `ray.init()` is called when a relay opens this
    object, and `ray.shutdown()` when it closes it.

    Args:
        model: an argument of `load_model`, for actors that load the model themselves, on whichever
            node they are; None: the relay's own model is sent through the object store.
        workers: the number of actors.
        threads: see `Prefiller`. Only actors on this node take threads from decoding.
        always: see `Prefiller`.
        timeout: seconds that a forward may take; after that the actor is killed and restarted.
        start_timeout: seconds within which the actors must be ready when a relay opens this object.
        ray_options: of the actors, for example `resources={"prefill": 1}`; default:
            `num_cpus=threads`, `max_restarts=-1` and `scheduling_strategy="SPREAD"`.

    Raises:
        ValueError: workers or threads is below 1, or a timeout is not above 0; or, when a relay
            opens this object, an actor's model differs from the relay's.
        NotImplementedError: when a relay opens this object, for a model that is not on the CPU.
        RuntimeError: when a relay opens this object and an actor is not ready in time.
    """

    name = "ray"

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        workers: int = 1,
        threads: int | None = None,
        always: bool = False,
        *,
        timeout: float = 120.0,
        start_timeout: float = 120.0,
        **ray_options: Any,
    ):
        super().__init__(workers, threads, always)
        for name, seconds in (("timeout", timeout), ("start_timeout", start_timeout)):
            if not seconds > 0:
                raise ValueError(f"Remote: {name} must be > 0 seconds, got {seconds}")
        self.model = None if model is None else os.fspath(model)
        self.timeout = timeout
        self.start_timeout = start_timeout
        self.ray_options = ray_options
        self._actors: _Actors | None = None

    def make_workers(self, model, threads: int) -> list[Worker]:
        """One worker per actor; a worker's prompts may go to any of the actors."""
        device = torch.device(getattr(model, "device", "cpu"))
        if device.type != "cpu":
            raise NotImplementedError(
                f"Remote: model must be on the CPU, got one on {device}: use prefill='overlapped' "
                "or 'serial' there"
            )
        sizes = Sizes.of(model)
        source = SavedModel.of(model) if self.model is None else NamedModel(self.model, sizes.dtype)
        options = {
            "num_cpus": threads,
            "max_restarts": -1,
            "scheduling_strategy": "SPREAD",
            **self.ray_options,
        }
        self._actors = actors = _Actors(source, threads, sizes, options)
        return [
            _ActorWorker(actors, self.timeout, self.start_timeout) for _ in range(self.num_workers)
        ]

    @property
    def host_threads(self) -> int:
        """See `Prefiller`; does not notice actors that Ray has moved since they started."""
        if self._actors is None:
            return 0
        here = ray.get_runtime_context().get_node_id()
        nodes = {introduction.node for introduction in self._actors.introductions}
        return self.threads or 0 if here in nodes else 0

    @property
    def process_ids(self) -> list[int]:
        """Process ids of the actors when they started, on any node."""
        actors = self._actors
        return [] if actors is None else [each.process for each in actors.introductions]


class _Actors:
    """The actors by state, shared by the workers' threads.

    Args:
        source: the model.
        threads: CPU threads of an actor.
        sizes: what the model's sizes must be.
        options: of the actors.
    """

    def __init__(
        self,
        source: SavedModel | NamedModel,
        threads: int,
        sizes: Sizes,
        options: dict[str, Any],
    ):
        self.sizes = sizes
        self.introductions: list[Introduction] = []
        self._threads = threads
        self._change = threading.Condition()
        self._all: list[Any] = []
        self._idle: list[Any] = []
        self._num_busy = 0
        # Actors that may come back, and their pending answers to whether they have.
        self._lost: list[tuple[Any, Any]] = []
        self._closed = False
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            ray.init()
        try:
            # Kept alive: an actor that is restarted reads it again.
            self._source = ray.put(source)
            self._class = ray.remote(PrefillActor).options(**options)
        except BaseException:
            self.close()
            raise

    def start_one(self, timeout: float) -> None:
        """Make an actor and wait until it is ready."""
        actor: Any = self._class.remote(self._source, self._threads)
        with self._change:
            self._all.append(actor)
            if self._closed:
                ray.kill(actor)
        try:
            introduction = ray.get(_introduce(actor), timeout=timeout)
        except ray.exceptions.GetTimeoutError as error:
            raise RuntimeError(
                f"Remote: actor must be ready within {timeout} s, got none: does a node have "
                "what ray_options require?"
            ) from error
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Remote: actor must start, got {error}") from error
        if introduction.sizes != self.sizes:
            raise ValueError(
                f"Remote: model must be the relay's, {self.sizes}, got {introduction.sizes}"
            )
        if introduction.isa != used_isa():
            _log.warning(
                "node %s computes with %s and this one with %s: bits may differ",
                introduction.node,
                introduction.isa,
                used_isa(),
            )
        with self._change:
            self.introductions.append(introduction)
            self._idle.append(actor)
            self._change.notify()

    def take(self) -> Any:
        """Takes a live actor for one job; waits while all live actors are busy."""
        with self._change:
            while True:
                if self._closed:
                    raise ActorLostError("Remote: prefiller must be open, got a closed one")
                self._look_for_lost()
                if self._idle:
                    self._num_busy += 1
                    return self._idle.pop()
                if not self._num_busy:
                    raise ActorLostError("Remote: an actor must be alive, got none")
                self._change.wait()

    def give_back(self, actor: Any, *, lost: bool = False) -> None:
        """Returns an actor that `take` gave out."""
        with self._change:
            self._num_busy -= 1
            if lost:
                self._lost.append((actor, _introduce(actor)))
            else:
                self._idle.append(actor)
            # Wakes all threads: if no actor lives any more, every one of them has to know.
            self._change.notify_all()

    def stop(self) -> None:
        """End the actors, even busy ones; a second call does nothing."""
        with self._change:
            self._closed = True
            actors, self._all = self._all, []
            self._change.notify_all()
        # The program may have shut Ray down already, and the actors with it.
        if ray.is_initialized():
            for actor in actors:
                ray.kill(actor)

    def close(self) -> None:
        """`stop`, and shut Ray down if it was started here; no thread waits for Ray any more."""
        self.stop()
        if self._owns_ray:
            self._owns_ray = False
            ray.shutdown()

    def _look_for_lost(self) -> None:
        """Takes back actors that Ray has restarted and drops those that it has given up."""
        lost, self._lost = self._lost, []
        for actor, answer in lost:
            if not ray.wait([answer], timeout=0)[0]:
                self._lost.append((actor, answer))
                continue
            try:
                ray.get(answer)
            except ray.exceptions.ActorUnavailableError:
                self._lost.append((actor, _introduce(actor)))
            except ray.exceptions.RayError as error:
                _log.warning("an actor is gone for good: %s", error)
            else:
                self._idle.append(actor)


class _ActorWorker(Worker):
    def __init__(self, actors: _Actors, timeout: float, start_timeout: float):
        self._actors = actors
        self._timeout = timeout
        self._start_timeout = start_timeout

    def start(self) -> None:
        self._actors.start_one(self._start_timeout)

    def compute(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        try:
            return self._ask(prompts)
        except ActorLostError as error:
            # Logged as text: the error holds frames, and they hold memory.
            _log.warning("%s; its prompts are computed again", str(error))
        return self._ask(prompts)

    def stop(self) -> None:
        self._actors.stop()

    def close(self) -> None:
        self._actors.close()

    def _ask(self, prompts: Sequence[Sequence[int]]) -> Prefilled:
        actor = self._actors.take()
        lost = True
        try:
            answer = ray.get(
                actor.compute.remote([list(prompt) for prompt in prompts]), timeout=self._timeout
            )
            lost = False
        except ray.exceptions.RayTaskError:
            # The prompt caused the error; the actor lives.
            lost = False
            raise
        except ray.exceptions.GetTimeoutError as error:
            ray.kill(actor, no_restart=False)
            raise ActorLostError(f"Remote: actor must answer within {self._timeout} s") from error
        except ray.exceptions.ObjectLostError as error:
            lost = False
            raise ActorLostError(f"Remote: keys and values were lost, {error!r}") from error
        except ray.exceptions.RayError as error:
            raise ActorLostError(f"Remote: actor was lost, {error!r}") from error
        finally:
            self._actors.give_back(actor, lost=lost)
        return unpack(answer, self._actors.sizes.dtype)


def _introduce(actor: Any) -> Any:
    """A future for an actor's introduction."""
    return actor.introduce.remote()
