"""Devices and requests combined: prefill in the loop, next to it on one device, or on others.

A policy need not know where prefill runs. To the policy, a query that was prefilled elsewhere is
like one that was parked after its first token: its keys and values exist and are copied in when the
policy gives it a row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from baton_engines.policies import Policy, Work
from baton_engines.query import Query

from ...workloads import Request, longest
from .costs import CostModel
from .decoder import Decoder, pairs
from .events import Events, SharedDevice
from .result import Result

PREFILLS = ("serial", "overlapped", "apart")


@dataclass(frozen=True)
class System:
    """Machines, and what runs on them.

    Args:
        cost: of a decode device; a group of devices that share every layer counts as one here.
        policy: creates a policy, one for each decode device.
        num_slots: of each decode device.
        prefill: "serial": in the decode devices' own loop, as the policy plans it. "overlapped":
            at the same time on the same device (see `SharedDevice`). "apart": on devices that do
            nothing else.
        decoders: number of decode devices; a query goes to the one with the fewest queries.
        prefillers: number of prefill devices, for "apart".
        prefill_cost: of a prefill device; default: `cost`.
        transfer: seconds for that many bytes from a prefill device to a decode device; the link of
            a prefill device carries one query at a time.
        max_prefill_tokens: the most tokens of prompts in one forward outside of the loop; a single
            prompt may be longer.
        lookahead: queries per decode device that may be prefilled, or in progress, before they have
            a row; default: num_slots.
        shape: of the cache, one of `decoder.SHAPES`.
        kv_budget: the most bytes of keys and values in the rows of a decode device.
        overlap: share of the ideal gain that two jobs on one device have (see `SharedDevice`).
        devices_each: devices per decode or prefill device, if it is a group.
    """

    cost: CostModel
    policy: Callable[[], Policy]
    num_slots: int
    prefill: str = "serial"
    decoders: int = 1
    prefillers: int = 0
    prefill_cost: CostModel | None = None
    transfer: Callable[[float], float] = lambda num_bytes: 0.0
    max_prefill_tokens: int = 2048
    lookahead: int | None = None
    shape: str = "ragged"
    kv_budget: int | None = None
    overlap: float = 0.5
    devices_each: int = 1

    def __post_init__(self):
        if self.prefill not in PREFILLS:
            raise ValueError(
                f"System: prefill must be one of {', '.join(PREFILLS)}, got {self.prefill!r}"
            )
        if (self.prefill == "apart") != (self.prefillers > 0):
            raise ValueError(
                f"System: prefillers must be above 0 for prefill apart and 0 otherwise, "
                f"got {self.prefillers} for {self.prefill}"
            )

    @property
    def num_devices(self) -> int:
        """All devices, including prefill devices."""
        return (self.decoders + self.prefillers) * self.devices_each


def simulate(system: System, requests: Sequence[Request]) -> Result:
    """Serves all requests until they end.

    Args:
        system: what serves them.
        requests: in order of arrival.

    Raises:
        ValueError: a plan cannot be executed or leaves queries waiting forever, or a query is too
            long for the budget.
    """
    longest_query = max(request.prompt_tokens + request.output_tokens - 1 for request in requests)
    needed = longest_query * system.cost.bytes_per_token
    if system.kv_budget is not None and needed > system.kv_budget:
        raise ValueError(
            f"simulate: kv_budget must hold every query, the longest takes {needed:.0f} bytes, "
            f"got {system.kv_budget}"
        )
    events = Events()
    devices = [SharedDevice(events, system.overlap) for _ in range(system.decoders)]
    feed: _Feed | None = None
    ended: list[Query] = []
    decoders = [
        Decoder(
            events,
            device,
            system.cost,
            system.policy(),
            num_slots=system.num_slots,
            capacity=longest(requests),
            shape=system.shape,
            kv_budget=system.kv_budget,
            more_to_come=lambda: num_entered < len(queries),
            on_admit=lambda query: feed.note_admitted() if feed is not None else None,
            on_end=ended.append,
        )
        for device in devices
    ]

    def hand_over(query: Query) -> None:
        min(decoders, key=lambda decoder: decoder.load).receive(query)

    if system.prefill != "serial":
        feed = _Feed(system, events, devices, decoders, hand_over, ended.append)
    queries = [_query(index, request) for index, request in enumerate(requests)]
    num_entered = 0

    def arrive(query: Query) -> None:
        nonlocal num_entered
        num_entered += 1
        (hand_over if feed is None else feed.receive)(query)
        if num_entered == len(queries):
            # A policy may have held queries back until now.
            for decoder in decoders:
                decoder.wake()

    for query in queries:
        events.at(query.submitted, lambda query=query: arrive(query))
    events.run()
    if len(ended) < len(queries):
        raise ValueError(f"simulate: all {len(queries)} queries must end, got {len(ended)}")
    return Result.of(
        queries,
        [decoder.counts for decoder in decoders],
        num_slots=system.num_slots * system.decoders,
        num_devices=system.num_devices,
        busy_seconds=sum(device.busy_seconds for device in devices),
    )


def _query(index: int, request: Request) -> Query:
    query = Query(index, request.arrival_seconds)
    # Policies only use its length.
    query.prompt = range(request.prompt_tokens)
    query.max_new_tokens = request.output_tokens
    return query


class _Feed:
    """Prefills queries in order of arrival, outside of the decode loop, and hands them over."""

    def __init__(self, system, events, devices, decoders, hand_over, on_end):
        self._system = system
        self._events = events
        self._cost = system.prefill_cost or system.cost
        self._hand_over = hand_over
        self._on_end = on_end
        self._pending: deque[Query] = deque()
        lookahead = system.num_slots if system.lookahead is None else system.lookahead
        self._room = lookahead * len(decoders)
        self._awake = False
        # An overlapped query stays on its device: `home` is the decoder that receives it.
        if system.prefill == "overlapped":
            self._lanes = [_Lane(*pair) for pair in zip(devices, decoders, strict=True)]
        else:
            self._lanes = [_Lane(SharedDevice(events, 0.0), None) for _ in range(system.prefillers)]

    def receive(self, query: Query) -> None:
        self._pending.append(query)
        self._wake()

    def note_admitted(self) -> None:
        self._room += 1
        self._wake()

    def _wake(self) -> None:
        if not self._awake:
            self._awake = True
            self._events.at(self._events.now, self._start, late=True)

    def _start(self) -> None:
        self._awake = False
        idle = [lane for lane in self._lanes if not lane.busy]
        # The device with the fewest queries to decode has the most time.
        for lane in sorted(idle, key=lambda lane: lane.home.load if lane.home else 0):
            batch = self._next_batch()
            if batch:
                self._prefill(lane, batch)

    def _next_batch(self) -> list[Query]:
        batch: list[Query] = []
        tokens = 0
        while self._pending and self._room > 0:
            length = len(self._pending[0].prompt)
            if batch and tokens + length > self._system.max_prefill_tokens:
                break
            batch.append(self._pending.popleft())
            tokens += length
            self._room -= 1
        return batch

    def _prefill(self, lane: _Lane, batch: list[Query]) -> None:
        lane.busy = True
        prefill = [(query, len(query.prompt)) for query in batch]
        tokens = sum(count for _, count in prefill)
        work = Work(tokens=tokens, rows=len(batch), prefill_columns=tokens, pairs=pairs(prefill))
        lane.device.start(self._cost.forward(work), lambda: self._done(lane, batch))

    def _done(self, lane: _Lane, batch: list[Query]) -> None:
        lane.busy = False
        now = self._events.now
        for query in batch:
            query.cached = len(query.prompt)
            query.tokens.append(0)
            query.first_token = now
            if query.max_new_tokens == 1:
                query.status, query.finished = "finished", now
                self._room += 1
                self._on_end(query)
            elif lane.home is not None:
                lane.home.receive(query)
            else:
                seconds = self._system.transfer(query.cached * self._cost.bytes_per_token)
                lane.link_free = max(lane.link_free, now) + seconds
                self._events.at(lane.link_free, lambda query=query: self._hand_over(query))
        self._wake()


class _Lane:
    def __init__(self, device: SharedDevice, home: Decoder | None):
        self.device = device
        self.home = home
        self.busy = False
        self.link_free = 0.0
