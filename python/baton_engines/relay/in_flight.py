"""The prompts of one batch that are computed elsewhere, from the plan to the insertion.

While its prompt is in flight, a query holds a row of no tokens, so that its slot is taken and
everything else (cancel, preempt, resize) treats it like any other query. Only `wait` waits for a
worker.
"""

from __future__ import annotations

import logging

import torch

from ..policies import Forward
from ..prefill import Job, Prefilled, Prefiller
from ..query import Query
from ..query.errors import drop_tracebacks
from ..slots import Row
from .batch import Batch

_log = logging.getLogger(__name__)


class Trip:
    """A job, and the queries to which its prompts belong."""

    def __init__(self, queries: tuple[Query, ...]):
        self.queries = queries
        self.job = Job([query.prompt for query in queries])


class InFlight:
    """Queries by the job that computes their prompt.

    Args:
        batch: the queries; one that leaves is forgotten here.
        prefiller: an open one.
    """

    def __init__(self, batch: Batch, prefiller: Prefiller):
        self.prefiller = prefiller
        self._batch = batch
        batch.on_leave = self.forget
        # Workers on a GPU do not take cores from the loop.
        on_cpu = batch.slots.cache.keys.device.type == "cpu"
        self._worker_threads = prefiller.host_threads if on_cpu and prefiller.num_workers else 0
        self._trips: list[Trip] = []
        self._trip_of: dict[int, Trip] = {}
        self._home: set[int] = set()

    def __contains__(self, query: Query) -> bool:
        return query.id in self._trip_of

    def __bool__(self) -> bool:
        """Whether any query waits for its prompt."""
        return bool(self._trip_of)

    def hand_over(self, forward: Forward) -> None:
        """Hand over the prompts of a forward that can be computed elsewhere."""
        batch = self._batch
        for query, _ in forward.prefill:
            # A Ctrl-C came between reserving the row and handing over, or during an insertion.
            if query not in self and batch.slots.vacant(query):
                batch.slots.leave(query)
        queries = [
            query
            for query in self._wanted(forward)
            # The row has no columns until there is something to write into them.
            if batch.enter(query, 0)
        ]
        # Spread over the idle workers.
        idle = self.prefiller.num_workers - sum(not trip.job.done for trip in self._trips)
        parts = min(len(queries), max(1, idle))
        for first in range(parts):
            self._leave(Trip(tuple(queries[first::parts])))

    def land(self) -> None:
        """Insert finished prompts, between two steps; their queries decode from here on.

        If Ctrl-C interrupts it, the next call continues: a query counts as in flight until its row
        is written, and after that as one whose forward was interrupted.
        """
        for trip in [trip for trip in self._trips if trip.job.done]:
            if trip.job.error is not None:
                self._come_home(trip, trip.job.error)
            elif trip.job.prefilled is not None:
                self._enter(trip, trip.job.prefilled)
            if trip in self._trips:
                self._trips.remove(trip)
        for query in self.computing():
            self._batch.begin_span(query, "prefill", self._batch.clock())

    def computing(self) -> list[Query]:
        """The queries whose prompt is being computed, without those that wait for a worker."""
        trips = [trip for trip in self._trips if trip.job.started]
        return [q for trip in trips for q in trip.queries if self._trip_of.get(q.id) is trip]

    def wait(self) -> None:
        """Wait until a job has ended."""
        self.prefiller.wait([trip.job for trip in self._trips if not trip.job.abandoned])

    def forget(self, query: Query) -> None:
        """The query does not need its prompt any more, if it is computed elsewhere."""
        self._home.discard(query.id)
        trip = self._trip_of.pop(query.id, None)
        if trip is None:
            return
        if not any(self._trip_of.get(other.id) is trip for other in trip.queries):
            # A worker that has already started continues, and its result is dropped.
            trip.queries = ()
            trip.job.abandoned = True
            trip.job.prefilled = None

    def share_cores(self, total: int) -> None:
        """Leave busy workers their cores, out of `total`; the loop keeps at least one."""
        busy = sum(trip.job.started and not trip.job.done for trip in self._trips)
        if self._worker_threads:
            _set_num_threads(max(1, total - busy * self._worker_threads))

    def take_cores_back(self, total: int) -> None:
        """Let the calling thread use all cores again."""
        if self._worker_threads:
            _set_num_threads(total)

    def _wanted(self, forward: Forward) -> list[Query]:
        # Only whole prompts of forwards without decoding: a policy that packs prompts with decoding
        # queries wants one forward for both, and a part of a prompt needs the row it continues in.
        if forward.decode or not self.prefiller.num_workers:
            return []
        decoding = any(query.tokens for query in self._batch.running.values())
        if not (decoding or self or self.prefiller.always):
            return []
        return [
            query
            for query, count in forward.prefill
            if query.status == "running"
            and query.slot is None
            and not query.cached
            and count >= query.prompt_left
            and query.id not in self._home
        ]

    def _leave(self, trip: Trip) -> None:
        # In this order, so that after a Ctrl-C in between no wait is for a job that never comes.
        self.prefiller.submit(trip.job)
        self._trips.append(trip)
        self._trip_of.update((query.id, trip) for query in trip.queries)

    def _come_home(self, trip: Trip, error: BaseException) -> None:
        """Leave a failed job's prompts to the loop, which finds out whether one caused the
        error."""
        _log.info("prefill elsewhere failed", exc_info=error)
        drop_tracebacks(error)
        batch = self._batch
        for query in trip.queries:
            if self._trip_of.get(query.id) is trip:
                batch.slots.leave(query)
                batch.timeline.end(query.id, batch.clock())
                del self._trip_of[query.id]
                self._home.add(query.id)
                batch.counters.prefill_faults += 1

    def _enter(self, trip: Trip, prefilled: Prefilled) -> None:
        batch, rows, entered = self._batch, [], []
        for index, query in enumerate(trip.queries):
            row = Row(query, len(query.prompt))
            # Cancelled, or handed over again since; or parked, now or for a row before this one.
            if self._trip_of.get(query.id) is not trip or not batch.make_room([row]):
                continue
            key, value = prefilled.rows[index]
            if batch.attempt(query, "insertion", batch.slots.fill, query, key, value):
                del self._trip_of[query.id]
                rows.append(row)
                entered.append(index)
        if not rows:
            return
        batch.note_peak_kv_bytes()
        counters = batch.counters
        counters.prefills_elsewhere += len(rows)
        counters.prompt_tokens += sum(row.num_tokens for row in rows)
        counters.columns_read += sum(row.num_tokens for row in rows)
        logits = prefilled.logits[entered]
        batch.take(rows, logits, batch.choose(rows, logits))


def _set_num_threads(count: int) -> None:
    # For the calling thread: each thread that calls OpenMP has its own team.
    if count != torch.get_num_threads():
        torch.set_num_threads(count)
