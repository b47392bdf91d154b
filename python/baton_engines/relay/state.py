"""The readable state of a relay: its cache, its queries, its measurements."""

from __future__ import annotations

from collections.abc import Callable

from ..policies import Policy
from ..query import Query
from .batch import Batch
from .counters import Counters, Span, Timeline
from .decode_loop import DecodeLoop


class RelayState:
    """The part of a `Relay` that only reads.

    Attributes:
        policy: the `Policy` object.
    """

    policy: Policy
    _batch: Batch
    _loop: DecodeLoop
    _clock: Callable[[], float]

    @property
    def cache(self):
        """The KVCache; for reading only."""
        return self._batch.slots.cache

    @property
    def counters(self) -> Counters:
        """Counts of the relay's work: see `Counters`."""
        return self._batch.counters

    @property
    def num_slots(self) -> int:
        """The most queries that run at a time."""
        return self._batch.slots.num_slots

    @property
    def waiting(self) -> tuple[Query, ...]:
        """Queries that wait for a slot, in order of submission."""
        return tuple(self._batch.waiting.values())

    @property
    def running(self) -> tuple[Query, ...]:
        """Queries in the batch, in order of admission."""
        return tuple(self._batch.running.values())

    @property
    def parked(self) -> tuple[Query, ...]:
        """Preempted queries that wait for `resume`."""
        return tuple(self._batch.parked.values())

    @property
    def parked_bytes(self) -> int:
        """Bytes of the keys and values in host memory."""
        return self._batch.slots.parked_bytes

    @property
    def prefix_bytes(self) -> int:
        """Bytes of the keys and values in the prefix cache."""
        prefixes = self._batch.slots.prefixes
        return 0 if prefixes is None else prefixes.bytes_in_use

    @property
    def timeline(self) -> list[Span]:
        """The newest 16384 spans in which a query held a slot; stalls split spans."""
        return self._batch.timeline.spans(self._clock())

    def reset_counters(self) -> None:
        """Start counters and timeline anew, e.g. for a measurement after a warm-up."""
        self._batch.counters = Counters()
        self._batch.timeline = Timeline()

    def summary(self) -> dict:
        """Policy, prefill mode, slots, rates, latencies in seconds, the idle split and all
        counters, by name."""
        mode = self._loop.in_flight.prefiller.name
        about = {"policy": self.policy.name, "prefill": mode, "num_slots": self.num_slots}
        return {**about, **self.counters.summary()}
