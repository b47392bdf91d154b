"""One iteration of a relay: carries out the policy's plan on the batch.

Errors that no single query caused (a broken policy, Ctrl-C) propagate from `iterate`; the batch
stays consistent and the next iteration continues: tokens that were delivered stay, the others are
computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..policies import Forward, Plan, View, Work
from ..slots import Row
from .autoscale import Autoscale
from .batch import Batch
from .graphs import DecodeGraphs
from .in_flight import InFlight

_log = logging.getLogger(__name__)


class Computed(NamedTuple):
    """The result of a forward.

    Attributes:
        rows: the rows that could be computed.
        logits: [rows, vocab], as the model computed them.
        likeliest: token of each row, -1 where logits are not finite; None if not known yet.
        is_typical: whether its duration is typical of such a forward.
    """

    rows: list[Row]
    logits: torch.Tensor
    likeliest: list[int] | None = None
    is_typical: bool = True


class DecodeLoop:
    """Carries out plans of the batch's policy.

    Args:
        batch: the queries and their slots.
        in_flight: the prompts that are computed elsewhere.
        autoscale: changes the number of slots with the load; None keeps it.
        graphs: CUDA graphs of decode steps; None to launch every step.
        observed: whether the policy is told how long forwards take.

    Attributes:
        stepping: whether an iteration is in progress.
    """

    def __init__(
        self,
        batch: Batch,
        in_flight: InFlight,
        autoscale: Autoscale | None = None,
        graphs: DecodeGraphs | None = None,
        *,
        observed: bool = True,
    ):
        self.batch = batch
        self.in_flight = in_flight
        self.autoscale = autoscale
        self.graphs = graphs
        self.observed = observed
        self.stepping = False
        # When the previous forward had delivered its tokens, or this iteration began.
        self._since = 0.0
        # Queries of which a chunk was computed separately since the last step.
        self._chunked: set[int] = set()

    def iterate(self, more_to_come: bool = False) -> bool:
        """Carry out one plan; returns whether anything is left to do.

        Args:
            more_to_come: whether a policy may hold queries back until others are submitted.
        """
        batch, in_flight = self.batch, self.in_flight
        if not batch.waiting and not batch.running:
            # The last query may have been cancelled between two steps.
            self._rest()
            return False
        self.stepping = True
        begin, num_threads = batch.clock(), torch.get_num_threads()
        self._since = begin
        try:
            in_flight.land()
            # The queries whose prompts arrived may have been all, and may have ended with one
            # token.
            if batch.waiting or batch.running:
                self._autoscale()
                plan = batch.policy.plan(self._view(begin, more_to_come))
                if not plan.admit and not batch.running and more_to_come:
                    return False
                self._admit(plan)
                computed = [self._forward(forward, num_threads) for forward in plan.forwards]
                if in_flight and not any(computed):
                    in_flight.wait()
                    in_flight.land()
        finally:
            self.stepping = False
            in_flight.take_cores_back(num_threads)
            seconds = batch.clock() - begin
            batch.counters.seconds += seconds
            batch.counters.slot_seconds += seconds * batch.slots.num_slots
            batch.count_bytes()
        if batch.waiting or batch.running:
            return True
        self._rest()
        return False

    def _rest(self) -> None:
        """Release the memory of rows while no query needs one."""
        slots = self.batch.slots
        if self.autoscale is not None and slots.num_slots > self.autoscale.low:
            self.batch.resize(self.autoscale.low)
        if slots.cache.bytes_committed:
            slots.cache.release()

    def _autoscale(self) -> None:
        if self.autoscale is None:
            return
        batch, num_slots = self.batch, self.batch.slots.num_slots
        wanted = self.autoscale.wanted(num_slots, len(batch.running), len(batch.waiting))
        if wanted == num_slots:
            return
        try:
            batch.resize(wanted)
        except MemoryError as error:
            # Continue with the rows that exist.
            _log.warning("no memory for %d slots, %d stay", wanted, num_slots, exc_info=error)

    def _view(self, now: float, more_to_come: bool) -> View:
        batch, slots = self.batch, self.batch.slots
        waiting = [query for query in batch.waiting.values() if not query.is_held_back()]
        for query in waiting:
            slots.look_up(query)
        return View(
            waiting=waiting,
            running=batch.running.values(),
            num_slots=slots.num_slots,
            capacity=slots.capacity,
            bytes_in_use=slots.cache.bytes_in_use,
            bytes_per_token=slots.cache.bytes_per_token,
            now=now,
            kv_budget=slots.kv_budget,
            whole_prompts=slots.whole_prompts,
            more_to_come=more_to_come,
            prefills_elsewhere=self.in_flight.prefiller.num_workers > 0,
        )

    def _admit(self, plan: Plan) -> None:
        batch = self.batch
        name = batch.policy.name
        free = batch.slots.num_slots - len(batch.running) + len(plan.park)
        if len(plan.admit) > free:
            raise ValueError(
                f"Relay.step: plan of {name} must admit at most {free} queries, "
                f"got {len(plan.admit)}"
            )
        if not plan.admit and not batch.running:
            raise ValueError(
                f"Relay.step: plan of {name} must admit a query when nothing runs, got none"
            )
        for query in plan.park:
            batch.unseat(query)
        for query in plan.admit:
            batch.admit(query)
            if query.cached and not query.prompt_left:
                if batch.slots.fits([Row(query, 0)]):
                    batch.enter(query, query.cached)
                else:
                    batch.unseat(query)

    def _forward(self, forward: Forward, num_threads: int) -> bool:
        """Compute a forward with the threads that prompts elsewhere leave over; returns whether
        there was anything to compute."""
        batch = self.batch
        self.in_flight.hand_over(forward)
        self.in_flight.share_cores(num_threads)
        rows = batch.make_room(self._rows(forward))
        if not rows:
            return False
        taking_part = {query.id for query, _ in rows}
        stalled = [
            query
            for query in batch.running.values()
            if query.tokens and query.id not in taking_part
        ]
        begin = batch.clock()
        rows = self._seat(rows)
        for query in stalled:
            batch.timeline.end(query.id, begin)
        for query, _ in rows:
            batch.begin_span(query, "decode" if query.tokens else "prefill", begin)
        computed = self._compute(rows, forward.padded)
        if computed is None:
            return True
        done, logits = computed.rows, computed.logits
        choices = batch.choose(done, logits, computed.likeliest)
        now = batch.clock()
        # If a row failed, rows were tried one by one, without padding.
        padded = forward.padded and done == rows
        self._count(done, padded, len(stalled), now - begin)
        for query in stalled:
            batch.begin_span(query, "decode", now)
        work = _work(done, padded)
        batch.take(done, logits, choices)
        since, self._since = self._since, batch.clock()
        if self.observed and computed.is_typical:
            batch.policy.observe(work, self._since - since)
        return True

    def _rows(self, forward: Forward) -> list[Row]:
        """The rows of a forward that have something to compute."""
        rows = [
            Row(query, min(count, query.prompt_left))
            for query, count in forward.prefill
            if query.status == "running" and query.prompt_left and query not in self.in_flight
        ]
        if forward.decode:
            running = self.batch.running.values()
            rows += [Row(query, 1) for query in running if not query.prompt_left]
        # After an interruption some rows have their columns already. Then only these run: in an
        # aligned cache no row can grow without the others.
        return [row for row in rows if self.batch.slots.lagging(row.query)] or rows

    def _seat(self, rows: list[Row]) -> list[Row]:
        """Reserve columns for what is computed next, and slots for queries without one; returns the
        rows for which that worked."""
        batch = self.batch
        batch.slots.reserve([row for row in rows if row.query.slot is not None])
        rows = [
            row
            for row in rows
            if row.query.slot is not None
            or batch.enter(row.query, row.query.cached + row.num_tokens)
        ]
        batch.note_peak_kv_bytes()
        return rows

    def _compute(self, rows: Sequence[Row], padded: bool) -> Computed | None:
        """The rows that could be computed, if any; the queries of the others have failed."""
        compute = self.batch.slots.compute
        try:
            if self.graphs is not None and not padded and self.graphs.takes(rows):
                return self._replay(self.graphs, rows)
            if len(rows) > 1:
                return Computed(list(rows), compute(rows, padded=padded))
        except Exception as error:
            # The error does not say which row caused it, so every row is tried by itself.
            _log.info("forward of %d rows failed", len(rows), exc_info=error)
        computed: list[Row] = []
        logits: list[torch.Tensor] = []
        for row in rows:
            done = self.batch.attempt(row.query, "forward", compute, [row])
            if done is not None:
                computed.append(row)
                logits.append(done.result)
        if not computed:
            return None
        # After rows were tried again, the duration says nothing about the next forward.
        # torch's threads would copy the logits of one row too, and then spin next to ours.
        whole = logits[0] if len(logits) == 1 else torch.cat(logits)
        return Computed(computed, whole, is_typical=len(rows) == 1)

    def _replay(self, graphs: DecodeGraphs, rows: Sequence[Row]) -> Computed:
        decoded = graphs.decode(rows)
        logits = decoded.logits
        if self.batch.on_logits is not None:
            # Cloned, because a callback may keep the logits.
            logits = logits.clone()
        self.batch.counters.replayed_steps += decoded.replayed
        # A capture happens only once, so its duration is not typical.
        return Computed(list(rows), logits, decoded.tokens, is_typical=decoded.replayed)

    def _count(self, rows: Sequence[Row], padded: bool, num_stalled: int, seconds: float) -> None:
        counters, slots = self.batch.counters, self.batch.slots
        prefilled = [(query.id, count) for query, count in rows if not query.tokens]
        tokens = sum(count for _, count in rows)
        padding = _padding(rows) if padded else 0
        counters.prompt_tokens += sum(count for _, count in prefilled)
        # Attention reads the valid columns of its rows and columns of computed padding, but never
        # the padding that aligns an aligned cache.
        counters.columns_read += sum(slots.length(query) for query, _ in rows) + padding
        counters.padding_columns_read += padding
        is_step = len(prefilled) < len(rows)
        if padded or (prefilled and is_step):
            counters.joint_tokens += tokens + padding
            counters.joint_padding_tokens += padding
        if not is_step:
            counters.prefill_seconds += seconds
            counters.stalled_slot_seconds += seconds * num_stalled
            self._chunked.update(id for id, _ in prefilled)
            return
        counters.decode_seconds += seconds
        counters.joint_seconds += seconds if prefilled else 0
        counters.steps += 1
        counters.slot_steps += slots.num_slots
        chunked = self._chunked.difference(query.id for query, _ in rows)
        counters.active_slot_steps += len(rows) + len(chunked.intersection(self.batch.running))
        self._chunked.clear()
        prefilling = len(self.in_flight.computing())
        counters.active_slot_steps += prefilling
        counters.prefilling_slot_steps += prefilling


def _padding(rows: Sequence[Row]) -> int:
    """Empty token slots in a rectangle that is as wide as the longest row."""
    return max(count for _, count in rows) * len(rows) - sum(count for _, count in rows)


def _work(rows: Sequence[Row], padded: bool) -> Work:
    """The work of a forward, determined before its tokens are taken."""
    work = Work.of(
        [(query, count) for query, count in rows if not query.tokens],
        [query for query, _ in rows if query.tokens],
    )
    return work._replace(tokens=work.tokens + _padding(rows)) if padded else work
