"""What a relay shows of itself: its cache, its queries, its measurements."""

from __future__ import annotations

from collections.abc import Callable

from ..policies import Policy
from ..query import Query
from .counters import Counters, Span, Timeline
from .decode_loop import DecodeLoop


class RelayState:
    """The part of a `Relay` that only looks.

    Attributes:
        policy: the `Policy` object.
    """

    policy: Policy
    _loop: DecodeLoop
    _clock: Callable[[], float]

    @property
    def cache(self):
        """The KVCache, for reading."""
        return self._loop.slots.cache

    @property
    def counters(self) -> Counters:
        """What the relay has done."""
        return self._loop.counters

    @property
    def num_slots(self) -> int:
        """The most queries that run at a time."""
        return self._loop.slots.num_slots

    @property
    def waiting(self) -> tuple[Query, ...]:
        """Queries that wait for a slot, in order of submission."""
        return tuple(self._loop.waiting.values())

    @property
    def running(self) -> tuple[Query, ...]:
        """Queries in the batch, in order of admission."""
        return tuple(self._loop.running.values())

    @property
    def parked(self) -> tuple[Query, ...]:
        """Preempted queries that wait for `resume`."""
        return tuple(self._loop.parked.values())

    @property
    def parked_bytes(self) -> int:
        """Bytes of the keys and values in host memory."""
        return self._loop.slots.parked_bytes

    @property
    def timeline(self) -> list[Span]:
        """Who held which slot when, a span split by each stall; the newest 16384 spans."""
        return self._loop.timeline.spans(self._clock())

    def reset_counters(self) -> None:
        """Start counters and timeline anew, for a measurement after a warm-up."""
        self._loop.counters = Counters()
        self._loop.timeline = Timeline()

    def summary(self) -> dict:
        """Policy, prefill mode, slots, rates, latencies in seconds, the idle split and all
        counters, by name."""
        in_flight = self._loop.in_flight
        mode = "serial" if in_flight is None else in_flight.prefiller.name
        about = {"policy": self.policy.name, "prefill": mode, "num_slots": self.num_slots}
        return {**about, **self.counters.summary()}
