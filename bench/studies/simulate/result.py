"""The result of a simulated run, in the terms of the relay's own counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton_engines.query import Query

from .decoder import Counts


@dataclass(frozen=True)
class Result:
    """Rates and latencies of one run.

    Attributes:
        seconds: from the first arrival to the last token.
        queries, output_tokens: served.
        num_devices: devices used, including prefill devices.
        ttft: seconds to the first token, one per query, in order of arrival.
        gaps, gap_counts: seconds between two tokens of a query, and how often.
        slot_idle, prefill_stall, joint_padding, cache_padding_read: as in the relay's counters.
        busy: share of the time in which a decode device computed.
        steps, preemptions, copied_bytes, most_bytes: totals; the last one is the maximum on a
            device.
    """

    seconds: float
    queries: int
    output_tokens: int
    num_devices: int
    ttft: np.ndarray
    gaps: np.ndarray
    gap_counts: np.ndarray
    slot_idle: float
    prefill_stall: float
    joint_padding: float
    cache_padding_read: float
    busy: float
    steps: int
    preemptions: int
    copied_bytes: float
    most_bytes: float

    @classmethod
    def of(
        cls,
        queries: Sequence[Query],
        counts: Sequence[Counts],
        *,
        num_slots: int,
        num_devices: int,
        busy_seconds: float,
    ) -> Result:
        """The result for ended queries and the counters of each decode device."""
        begin = min(query.submitted for query in queries)
        seconds = max(query.finished for query in queries) - begin

        def total(name: str):
            return sum(getattr(one, name) for one in counts)

        gaps = [gap for one in counts for gap in one.gaps]
        return cls(
            seconds=seconds,
            queries=len(queries),
            output_tokens=sum(len(query.tokens) for query in queries),
            num_devices=num_devices,
            ttft=np.array([query.first_token - query.submitted for query in queries]),
            gaps=np.array([gap for gap, _ in gaps]),
            gap_counts=np.array([count for _, count in gaps], dtype=np.int64),
            slot_idle=1 - _share(total("active_slot_steps"), total("slot_steps"), of_nothing=1.0),
            prefill_stall=_share(total("stalled_slot_seconds"), num_slots * seconds),
            joint_padding=_share(total("joint_padding_tokens"), total("joint_tokens")),
            cache_padding_read=_share(total("padding_columns_read"), total("columns_read")),
            busy=_share(busy_seconds, seconds * len(counts)),
            steps=total("steps"),
            preemptions=total("preemptions"),
            copied_bytes=total("copied_bytes"),
            most_bytes=max(one.most_bytes for one in counts),
        )

    @property
    def tokens_per_second(self) -> float:
        """Output tokens."""
        return self.output_tokens / self.seconds

    @property
    def tokens_per_device(self) -> float:
        """Output tokens per second and device, counting prefill devices."""
        return self.tokens_per_second / self.num_devices

    def ttft_percentile(self, percent: float) -> float:
        """Seconds to the first token that `percent` of the queries do not exceed."""
        return float(np.percentile(self.ttft, percent, method="inverted_cdf"))

    def gap_percentile(self, percent: float) -> float:
        """Seconds between two tokens that `percent` of them do not exceed; 0 without any."""
        if not len(self.gaps):
            return 0.0
        order = np.argsort(self.gaps, kind="stable")
        reached = np.cumsum(self.gap_counts[order])
        index = np.searchsorted(reached, reached[-1] * percent / 100)
        return float(self.gaps[order][index])


def _share(part: float, whole: float, of_nothing: float = 0.0) -> float:
    return part / whole if whole else of_nothing
