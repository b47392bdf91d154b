"""Measurements of a relay: idle work split as in BATON, latencies, and which query held which slot.

The size of everything here is independent of the number of queries served.
"""

import math
from collections import deque
from dataclasses import dataclass, field, fields
from typing import NamedTuple

# The ratio between neighboring buckets of a histogram, so a percentile is within 1 % of the true
# one.
_RATIO = 1.02
_SMALLEST = 1e-7
_NUM_BUCKETS = 1600
_MAX_SPANS = 1 << 14


class Histogram:
    """Durations in logarithmic buckets from 0.1 microseconds to months; percentiles within 1 %."""

    def __init__(self):
        self.count = 0
        self._buckets = [0] * _NUM_BUCKETS
        self._low = math.inf
        self._high = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self.count += 1
        self._low = min(self._low, seconds)
        self._high = max(self._high, seconds)
        index = int(math.log(max(seconds, _SMALLEST) / _SMALLEST, _RATIO))
        self._buckets[min(index, _NUM_BUCKETS - 1)] += 1

    def percentile(self, percent: float) -> float | None:
        """The duration that `percent` of all do not exceed; None if nothing was counted."""
        rank = max(1, math.ceil(self.count * percent / 100))
        for index, count in enumerate(self._buckets):
            rank -= count
            if count and rank <= 0:
                middle = _SMALLEST * _RATIO ** (index + 0.5)
                return min(max(middle, self._low), self._high)
        return None


@dataclass
class Counters:
    """Counts since a relay was created or `Relay.reset_counters` was called.

    A step is a forward in which running queries decode, with or without newcomers' prefill. A joint
    forward is shared by decoders and prefills, or has padded rows.

    Attributes:
        submitted, finished, cancelled, failed: queries.
        steps: steps.
        replayed_steps: steps that a CUDA graph computed.
        prefills: queries whose prompt was computed.
        preemptions: rows that were copied out of the cache.
        insertions: parked rows that were copied back in.
        resizes: changes of the number of slots.
        prefills_elsewhere: queries whose prompt was computed outside the loop and inserted.
        prefill_faults: prompts that could not be computed elsewhere and were left to the loop.
        prompt_tokens, output_tokens: tokens computed, tokens generated.
        reused_tokens, reusing_queries: prompt tokens that were copied from the prefix cache
            instead of computed, and the queries to which they belong.
        slot_steps, active_slot_steps: slots, and slots in which a query computed since the step
            before (a chunk of its prompt, or its token), summed over steps. A slot is active while
            its prompt is computed elsewhere, but not while the prompt waits for a worker.
        prefilling_slot_steps: active slots whose prompt was computed elsewhere, summed over steps.
        prefill_seconds, decode_seconds: in forwards of the loop that only prefill, and in steps.
        joint_seconds: in steps that also prefilled. Their decoders take part, so none of it is a
            stall, but they wait for the prompts' share of the forward.
        seconds: in `Relay.step`, including callbacks.
        slot_seconds: slots x seconds.
        stalled_slot_seconds: slots that waited while a newcomer was prefilled separately, times
            those seconds.
        joint_tokens, joint_padding_tokens: token slots in joint forwards, and the padding in them.
        columns_read, padding_columns_read: cache columns that attention read, and the padding in
            them.
        shaping_bytes: keys and values copied within the cache, to keep rows aligned or to change
            the number of slots.
        parking_bytes: keys and values copied to host memory and back.
        peak_kv_bytes, peak_parked_bytes: the largest amounts of keys and values at any time, in the
            rows and parked.
        time_to_first_token: from submission to first token.
        time_per_token: between two tokens of a query, including pauses.
    """

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    replayed_steps: int = 0
    prefills: int = 0
    preemptions: int = 0
    insertions: int = 0
    resizes: int = 0
    prefills_elsewhere: int = 0
    prefill_faults: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    reused_tokens: int = 0
    reusing_queries: int = 0
    slot_steps: int = 0
    active_slot_steps: int = 0
    prefilling_slot_steps: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    joint_seconds: float = 0.0
    seconds: float = 0.0
    slot_seconds: float = 0.0
    stalled_slot_seconds: float = 0.0
    joint_tokens: int = 0
    joint_padding_tokens: int = 0
    columns_read: int = 0
    padding_columns_read: int = 0
    shaping_bytes: int = 0
    parking_bytes: int = 0
    peak_kv_bytes: int = 0
    peak_parked_bytes: int = 0
    time_to_first_token: Histogram = field(default_factory=Histogram)
    time_per_token: Histogram = field(default_factory=Histogram)

    @property
    def slot_idle(self) -> float:
        """`1 - active / (slots x steps)`."""
        return 1 - _share(self.active_slot_steps, self.slot_steps, of_nothing=1.0)

    @property
    def slot_prefilling(self) -> float:
        """Share of slots x steps in which a slot was taken but gave no token, because its prompt
        was computed elsewhere."""
        return _share(self.prefilling_slot_steps, self.slot_steps)

    @property
    def prefill_stall(self) -> float:
        """Share of slots x time in which a running query waited for a newcomer's separate prefill;
        the cost of a joint forward for its decoders is not included, see `joint_seconds`."""
        return _share(self.stalled_slot_seconds, self.slot_seconds)

    @property
    def joint_padding(self) -> float:
        """Share of padding in the token slots of joint forwards."""
        return _share(self.joint_padding_tokens, self.joint_tokens)

    @property
    def cache_padding_read(self) -> float:
        """Share of padding in the cache columns that attention read."""
        return _share(self.padding_columns_read, self.columns_read)

    def summary(self) -> dict[str, float | int | None]:
        """Rates, latencies in seconds, idle split and counts; None for what has not happened."""
        first, each = self.time_to_first_token, self.time_per_token
        plain = {
            f.name: value
            for f in fields(self)
            if not isinstance(value := getattr(self, f.name), Histogram)
        }
        return {
            "queries": self.finished,
            "queries_per_second": _share(self.finished, self.seconds),
            "output_tokens_per_second": _share(self.output_tokens, self.seconds),
            "ttft_p50": first.percentile(50),
            "ttft_p99": first.percentile(99),
            "time_per_token_p50": each.percentile(50),
            "time_per_token_p99": each.percentile(99),
            "slot_idle": self.slot_idle,
            "slot_prefilling": self.slot_prefilling,
            "prefill_stall": self.prefill_stall,
            "joint_padding": self.joint_padding,
            "cache_padding_read": self.cache_padding_read,
            **plain,
        }


def _share(part: float, whole: float, of_nothing: float = 0.0) -> float:
    return part / whole if whole else of_nothing


class Span(NamedTuple):
    """A stretch of time in which one query computed in one slot; kind "prefill" or "decode"."""

    slot: int
    query_id: int
    begin: float
    end: float
    kind: str


class Timeline:
    """Spans of the queries; a query's span continues while it computes without a stall.

    The newest 16384 ended spans are kept.
    """

    def __init__(self):
        self._ended: deque[Span] = deque(maxlen=_MAX_SPANS)
        self._open: dict[int, Span] = {}

    def begin(self, query_id: int, slot: int, kind: str, now: float) -> None:
        """The query computes from now on; its span continues if kind and slot are the same."""
        span = self._open.get(query_id)
        if span is not None and (span.slot, span.kind) == (slot, kind):
            return
        self.end(query_id, now)
        self._open[query_id] = Span(slot, query_id, now, now, kind)

    def end(self, query_id: int, now: float) -> None:
        """The query's span ends, if it has one."""
        span = self._open.pop(query_id, None)
        if span is not None:
            self._ended.append(span._replace(end=now))

    def spans(self, now: float) -> list[Span]:
        """All spans in order of their end; spans that are still open end now."""
        return [*self._ended, *(span._replace(end=now) for span in self._open.values())]
