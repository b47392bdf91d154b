"""A decode device under a policy: the relay's iteration, with the forward replaced by its cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from baton_engines.policies import Forward, Policy, View, Work
from baton_engines.query import Query, wait_in_order

from .costs import Cost, CostModel
from .events import Events, SharedDevice

# How the rows of a cache lie: anywhere; all ending in one column, so that attention also reads
# every row's padding; or the same, with the whole cache copied whenever a row enters or leaves.
SHAPES = ("ragged", "dense", "concatenated")

_MAX_FRUITLESS = 100


@dataclass
class Counts:
    """Counters of the decode devices, with the meanings of the relay's counters."""

    steps: int = 0
    slot_steps: int = 0
    active_slot_steps: int = 0
    stalled_slot_seconds: float = 0.0
    prompt_tokens: int = 0
    joint_tokens: int = 0
    joint_padding_tokens: int = 0
    columns_read: int = 0
    padding_columns_read: int = 0
    preemptions: int = 0
    copied_bytes: float = 0.0
    most_bytes: float = 0.0
    # Seconds between two tokens of a query, and how many queries waited that long.
    gaps: list[tuple[float, int]] = field(default_factory=list)


class Decoder:
    """One device with a batch of queries.

    Args:
        events: the clock.
        device: where forwards run; it may have other jobs.
        cost: of forwards.
        policy: plans every iteration; it is not shared with other decoders.
        num_slots, capacity: of the cache.
        shape: one of `SHAPES`.
        kv_budget: the most bytes of keys and values in the rows; None without a bound.
        more_to_come: whether further queries will arrive.
        on_admit: called with every query that gets a row.
        on_end: called with every query that has all its tokens.
    """

    def __init__(
        self,
        events: Events,
        device: SharedDevice,
        cost: CostModel,
        policy: Policy,
        *,
        num_slots: int,
        capacity: int,
        shape: str = "ragged",
        kv_budget: int | None = None,
        more_to_come: Callable[[], bool] = lambda: False,
        on_admit: Callable[[Query], object] = lambda query: None,
        on_end: Callable[[Query], object] = lambda query: None,
    ):
        if shape not in SHAPES:
            raise ValueError(f"Decoder: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
        self.counts = Counts()
        self.waiting: dict[int, Query] = {}
        self.running: dict[int, Query] = {}
        self._events = events
        self._device = device
        self._cost = cost
        self._policy = policy
        self._num_slots = num_slots
        self._capacity = capacity
        self._shape = shape
        self._kv_budget = kv_budget
        self._more_to_come = more_to_come
        self._on_admit = on_admit
        self._on_end = on_end
        self._awake = False
        # Plans since the last one that led to a forward.
        self._fruitless = 0
        self._forwards: list[Forward] = []
        # Tokens of all running queries whose keys and values are cached.
        self._cached = 0
        # Queries of which a chunk was computed separately since the last step.
        self._chunked: set[int] = set()
        self._last_step = 0.0
        # When queries that were not in the last decode step got their last token.
        self._last_token: dict[int, float] = {}
        # Duration of the copies that the next forward waits for.
        self._copying = 0.0

    @property
    def load(self) -> int:
        """Queries that have not ended."""
        return len(self.waiting) + len(self.running)

    def receive(self, query: Query) -> None:
        """Adds a waiting query; one that was prefilled elsewhere already has its first token."""
        if query.tokens:
            self._last_token[query.id] = query.first_token
        wait_in_order(self.waiting, query)
        self.wake()

    def wake(self) -> None:
        """Plans an iteration, unless one is running."""
        if not self._awake:
            self._awake = True
            self._events.at(self._events.now, self._plan, late=True)

    def _plan(self) -> None:
        if not self.waiting and not self.running:
            self._awake = False
            return
        more_to_come = self._more_to_come()
        plan = self._policy.plan(
            View(
                waiting=self.waiting.values(),
                running=self.running.values(),
                num_slots=self._num_slots,
                capacity=self._capacity,
                bytes_in_use=self._cached * self._cost.bytes_per_token,
                bytes_per_token=self._cost.bytes_per_token,
                now=self._events.now,
                kv_budget=self._kv_budget,
                whole_prompts=self._shape != "ragged",
                more_to_come=more_to_come,
            )
        )
        if not plan.admit and not self.running and more_to_come:
            self._awake = False
            return
        free = self._num_slots - len(self.running) + len(plan.park)
        if len(plan.admit) > free or not (plan.admit or self.running):
            raise ValueError(
                f"simulate: plan of {self._policy.name} must admit up to {free} queries, and one "
                f"when nothing runs, got {len(plan.admit)}"
            )
        for query in plan.park:
            self._park(query)
        for query in plan.admit:
            self._admit(query)
        self._forwards = list(plan.forwards)
        self._next_forward()

    def _fits(self, tokens: int) -> bool:
        """Whether the rows may hold that many additional tokens."""
        if self._kv_budget is None:
            return True
        return (self._cached + tokens) * self._cost.bytes_per_token <= self._kv_budget

    def _park(self, query: Query) -> None:
        del self.running[query.id]
        self._cached -= query.cached
        if query.cached:
            self._copy(query.cached)
            self.counts.preemptions += 1
        if query.tokens:
            self._last_token.setdefault(query.id, self._last_step)
        wait_in_order(self.waiting, query)

    def _admit(self, query: Query) -> None:
        if query.cached and not self._fits(query.cached):
            return
        del self.waiting[query.id]
        length, incoming = self._aligned_length(), max(query.cached, len(query.prompt))
        if self._shape == "concatenated":
            # A new cache with room for the longest row, including the newcomer.
            self._copy(max(length, incoming) * (len(self.running) + 1))
        else:
            if self._shape == "dense" and incoming > length:
                # Every running row moves to the right, to end where the newcomer ends.
                self._copy(self._cached)
            self._copy(query.cached)
        self.running[query.id] = query
        query.status = "running"
        self._cached += query.cached
        self._on_admit(query)

    def _copy(self, tokens: int) -> None:
        if tokens:
            num_bytes = tokens * self._cost.bytes_per_token
            self.counts.copied_bytes += num_bytes
            self._copying += self._cost.copy(num_bytes)

    def _aligned_length(self) -> int:
        return max((query.cached for query in self.running.values()), default=0)

    def _next_forward(self) -> None:
        while self._forwards:
            forward = self._forwards.pop(0)
            prefill = [
                (query, min(count, query.prompt_left))
                for query, count in forward.prefill
                if query.status == "running" and query.prompt_left
            ]
            decode = (
                [query for query in self.running.values() if not query.prompt_left]
                if forward.decode
                else []
            )
            while not self._fits(sum(count for _, count in prefill) + len(decode)):
                victim = self._policy.victim(self.running.values())
                self._park(victim)
                prefill = [row for row in prefill if row[0] is not victim]
                decode = [query for query in decode if query is not victim]
            if prefill or decode:
                self._start(prefill, decode, forward.padded)
                return
        self._fruitless += 1
        if self._fruitless > _MAX_FRUITLESS:
            raise ValueError(
                f"simulate: plan of {self._policy.name} must lead to a forward, got "
                f"{_MAX_FRUITLESS} in a row that did not"
            )
        self._plan()

    def _start(self, prefill: list[tuple[Query, int]], decode: list[Query], padded: bool) -> None:
        self._fruitless = -1
        work, counts, begin = self._work(prefill, decode, padded), self.counts, self._events.now
        in_use = self._cached + sum(count for _, count in prefill) + len(decode)
        counts.most_bytes = max(counts.most_bytes, in_use * self._cost.bytes_per_token)
        stalled = 0
        if decode:
            counts.steps += 1
            counts.slot_steps += self._num_slots
            counts.active_slot_steps += work.rows
            if self._chunked:
                # A query of which a chunk was computed separately has not been idle either.
                taking_part = {query.id for query in (*decode, *(query for query, _ in prefill))}
                chunked = (self._chunked - taking_part) & self.running.keys()
                counts.active_slot_steps += len(chunked)
                self._chunked.clear()
        else:
            stalled = sum(1 for query in self.running.values() if query.tokens)
            self._chunked.update(query.id for query, _ in prefill)
        cost = self._cost.forward(work)
        if self._copying:
            cost = Cost(cost.seconds + self._copying, cost.compute, cost.memory)
            self._copying = 0.0

        def done() -> None:
            counts.stalled_slot_seconds += stalled * (self._events.now - begin)
            if decode:
                self._take_step(decode)
            for query, count in prefill:
                self._take_prompt(query, count)
            self._policy.observe(work, self._events.now - begin)
            self._next_forward()

        self._device.start(cost, done)

    def _work(self, prefill: list[tuple[Query, int]], decode: list[Query], padded: bool) -> Work:
        """Returns what the forward computes, and counts it."""
        counts = self.counts
        prompt = sum(count for _, count in prefill)
        tokens, rows = prompt + len(decode), len(prefill) + len(decode)
        decode_columns = sum(query.cached + 1 for query in decode)
        prefill_columns = sum(query.cached + count for query, count in prefill)
        valid = decode_columns + prefill_columns
        padding_tokens = 0
        if padded:
            # A rectangle: every row computes and attends as if it had the longest row's number of
            # tokens.
            longest = max((count for _, count in prefill), default=1)
            padding_tokens = longest * rows - tokens
            prefill = [(query, longest) for query in (*(q for q, _ in prefill), *decode)]
            decode_columns, prefill_columns = 0, valid + padding_tokens
        elif self._shape != "ragged" and decode:
            decode_columns = len(decode) * (self._aligned_length() + 1)
        counts.prompt_tokens += prompt
        if padded or (prompt and decode):
            counts.joint_tokens += tokens + padding_tokens
            counts.joint_padding_tokens += padding_tokens
        counts.columns_read += decode_columns + prefill_columns
        counts.padding_columns_read += decode_columns + prefill_columns - valid
        return Work(
            tokens=tokens + padding_tokens,
            rows=rows,
            decode_rows=0 if padded else len(decode),
            decode_columns=decode_columns,
            prefill_columns=prefill_columns,
            pairs=pairs(prefill),
        )

    def _take_step(self, decode: list[Query]) -> None:
        now, late = self._events.now, self._last_token
        steady = len(decode)
        self._cached += steady
        for query in decode:
            query.cached += 1
            query.tokens.append(0)
            if late and query.id in late:
                self.counts.gaps.append((now - late.pop(query.id), 1))
                steady -= 1
        if steady:
            self.counts.gaps.append((now - self._last_step, steady))
        self._last_step = now
        for query in decode:
            if len(query.tokens) == query.max_new_tokens:
                self._end(query)

    def _take_prompt(self, query: Query, count: int) -> None:
        query.cached += count
        self._cached += count
        if query.prompt_left:
            return
        query.tokens.append(0)
        query.first_token = self._events.now
        if query.max_new_tokens == 1:
            self._end(query)
        else:
            self._last_token[query.id] = self._events.now

    def _end(self, query: Query) -> None:
        del self.running[query.id]
        self._cached -= query.cached
        if self._shape == "concatenated" and self.running:
            self._copy(self._aligned_length() * len(self.running))
        query.status, query.finished = "finished", self._events.now
        self._policy.note_end(query)
        self._on_end(query)


def pairs(prefill: list[tuple[Query, int]]) -> int:
    """Query-key pairs in the causal attention of prompt tokens."""
    return sum(count * query.cached + count * (count + 1) // 2 for query, count in prefill)
