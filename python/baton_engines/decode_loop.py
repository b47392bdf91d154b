"""The state of a relay, and one iteration of it.

Every query that has not ended is in exactly one of `waiting`, `running` and `parked`. Whatever goes
wrong in a forward, a callback or a tokenizer ends the one query it belongs to. What is no query's
fault (a broken policy, Ctrl-C) is raised by `iterate`, with a state from which the next iteration
goes on: tokens that were delivered stay, the others are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from .counters import Counters, Timeline
from .policies import Forward, Plan, Policy, View
from .query import Query
from .sampling import greedy
from .slots import Row, Slots

_log = logging.getLogger(__name__)


class DecodeLoop:
    """Queries by status, and what moves them.

    Args:
        slots: the cache and its rows.
        policy: plans every iteration.
        clock: seconds.
        on_end: called with every query that ends.
    """

    def __init__(
        self,
        slots: Slots,
        policy: Policy,
        clock: Callable[[], float],
        on_end: Callable[[Query], object],
    ):
        self.slots = slots
        self.policy = policy
        self.clock = clock
        self.on_end = on_end
        self.waiting: dict[int, Query] = {}
        self.running: dict[int, Query] = {}
        self.parked: dict[int, Query] = {}
        self.counters = Counters()
        self.timeline = Timeline()
        self.stepping = False
        # Called with a query and its logits, float32 [vocab], before a token is chosen from them.
        self.on_logits: Callable[[Query, torch.Tensor], object] | None = None

    def iterate(self) -> bool:
        """Carry out one plan; whether anything is left to do."""
        if not self.waiting and not self.running:
            return False
        self.stepping = True
        begin = self.clock()
        try:
            plan = self.policy.plan(self._view(begin))
            self._admit(plan)
            for forward in plan.forwards:
                self._forward(forward)
        finally:
            self.stepping = False
            seconds = self.clock() - begin
            self.counters.seconds += seconds
            self.counters.slot_seconds += seconds * self.slots.num_slots
        if self.waiting or self.running:
            return True
        self.slots.cache.release()
        return False

    def place(self, query: Query) -> dict[int, Query] | None:
        """Which of `waiting`, `running` and `parked` holds the query; None if it has ended."""
        for queries in (self.waiting, self.running, self.parked):
            if queries.get(query.id) is query:
                return queries
        if query.ended:
            return None
        raise ValueError(f"relay: query must be one of this relay's, got {query!r}")

    def wait(self, query: Query) -> None:
        """Put a query that is nowhere among those that wait, in its order of submission."""
        query.status = "waiting"
        in_order = not self.waiting or next(reversed(self.waiting)) < query.id
        self.waiting[query.id] = query
        if not in_order:
            self.waiting = dict(sorted(self.waiting.items()))

    def unseat(self, query: Query) -> None:
        """Take a running query out of its row; it waits again, keys and values in host memory."""
        had_row = query.slot is not None
        self.slots.park(query)
        self.counters.preemptions += had_row
        self.timeline.end(query.id, self.clock())
        del self.running[query.id]
        self.wait(query)

    def end(self, query: Query, status: str, reason: str, error: Exception | None = None) -> None:
        """Take the query out wherever it is and let go of everything but its results."""
        for queries in (self.waiting, self.running, self.parked):
            queries.pop(query.id, None)
        self.slots.leave(query)
        query.status, query.finish_reason, query.error = status, reason, error
        query.finished = self.clock()
        if query._stopper is not None:
            query._final_text = query._stopper.text
        query._sampler = query._stopper = query._on_token = None
        self.timeline.end(query.id, query.finished)
        setattr(self.counters, status, getattr(self.counters, status) + 1)
        self.on_end(query)

    def fail(self, query: Query, error: Exception) -> None:
        """End the query with an error, unless it has ended."""
        if query.ended:
            return
        _log.info("query %d failed", query.id, exc_info=error)
        _drop_tracebacks(error)
        self.end(query, "failed", "error", error)

    def attempt(self, query: Query, what: str, function: Callable, *args) -> tuple[bool, object]:
        """Call what only this query needs: (True, result), or (False, None) and it has failed."""
        try:
            return True, function(*args)
        except Exception as cause:
            self.fail(
                query,
                _explained(f"{what} of query {query.id} must not raise, got {cause!r}", cause),
            )
            return False, None

    def _view(self, now: float) -> View:
        cache = self.slots.cache
        return View(
            waiting=self.waiting.values(),
            running=self.running.values(),
            num_slots=self.slots.num_slots,
            capacity=cache.shape.capacity,
            bytes_in_use=cache.bytes_in_use,
            bytes_per_token=cache.bytes_per_token,
            now=now,
        )

    def _admit(self, plan: Plan) -> None:
        name, free = self.policy.name, self.slots.num_slots - len(self.running) + len(plan.park)
        if len(plan.admit) > free:
            raise ValueError(
                f"step: plan of {name} must admit at most {free} queries, got {len(plan.admit)}"
            )
        if not plan.admit and not self.running:
            raise ValueError(f"step: plan of {name} must admit a query when nothing runs, got none")
        for query in plan.park:
            self.unseat(query)
        for query in plan.admit:
            del self.waiting[query.id]
            self.running[query.id] = query
            query.status = "running"
            if query.cached and not query.prompt_left:
                self._enter(query, query.cached)

    def _enter(self, query: Query, length: int) -> bool:
        had_parked = query._parked_kv is not None
        entered, _ = self.attempt(query, "insertion", self.slots.enter, query, length)
        self.counters.insertions += entered and had_parked
        return entered

    def _forward(self, forward: Forward) -> None:
        rows = self._rows(forward)
        if not rows:
            return
        taking_part = {query.id for query, _ in rows}
        stalled = [
            query for query in self.running.values() if query.tokens and query.id not in taking_part
        ]
        begin = self.clock()
        self.slots.reserve([row for row in rows if row.query.slot is not None])
        rows = [
            row
            for row in rows
            if row.query.slot is not None or self._enter(row.query, row.query.cached + row.count)
        ]
        for query in stalled:
            self.timeline.end(query.id, begin)
        for query, _ in rows:
            self.timeline.begin(
                query.id, query.slot, "decode" if query.tokens else "prefill", begin
            )
        rows, logits = self._compute(rows)
        if not rows:
            return
        choices = greedy(logits)
        now = self.clock()
        self._count(forward, rows, len(stalled), now - begin)
        for query in stalled:
            self.timeline.begin(query.id, query.slot, "decode", now)
        self._take(rows, logits, *choices)

    def _rows(self, forward: Forward) -> list[Row]:
        rows = [
            Row(query, min(count, query.prompt_left))
            for query, count in forward.prefill
            if query.status == "running" and query.prompt_left
        ]
        if forward.decode:
            rows += [Row(query, 1) for query in self.running.values() if not query.prompt_left]
        # After an interruption some rows have their columns already. They catch up alone: in an
        # aligned cache no row can grow without the others.
        return [row for row in rows if self.slots.lagging(row.query)] or rows

    def _compute(self, rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor | None]:
        """The rows that could be computed and their logits; the other queries have failed."""
        if len(rows) > 1:
            try:
                return list(rows), self.slots.compute(rows)
            except Exception as error:
                # Who is at fault cannot be told from the error, so everybody tries alone.
                _log.info("forward of %d rows failed", len(rows), exc_info=error)
        results = [
            (row, *self.attempt(row.query, "forward", self.slots.compute, [row])) for row in rows
        ]
        computed = [(row, logits) for row, done, logits in results if done]
        if not computed:
            return [], None
        return [row for row, _ in computed], torch.cat([logits for _, logits in computed])

    def _count(
        self, forward: Forward, rows: Sequence[Row], num_stalled: int, seconds: float
    ) -> None:
        counters, shape = self.counters, self.slots.cache.shape
        prefilled = [count for query, count in rows if not query.tokens]
        counters.prompt_tokens += sum(prefilled)
        # The attention reads the valid columns of its rows and nothing else: no padding is counted,
        # as there is none.
        counters.columns_read += sum(shape.length(query.slot) for query, _ in rows)
        if not forward.decode:
            counters.prefill_seconds += seconds
            counters.stalled_slot_seconds += seconds * num_stalled
            return
        counters.decode_seconds += seconds
        counters.steps += 1
        counters.slot_steps += self.slots.num_slots
        counters.active_slot_steps += len(rows)
        if prefilled:
            counters.joint_tokens += sum(count for _, count in rows)

    def _take(
        self,
        rows: Sequence[Row],
        logits: torch.Tensor,
        tokens: Sequence[int],
        finite: Sequence[bool],
    ) -> None:
        """Give every row whose prompt is complete its next token."""
        complete = [row.count >= row.query.prompt_left for row in rows]
        for row, done in zip(rows, complete, strict=True):
            # The last token of a row counts once the token that follows from it is delivered. Until
            # then it may be computed again.
            row.query.cached += row.count - done
        for index, row in enumerate(rows):
            # A callback of another row may have cancelled or preempted this one.
            if complete[index] and row.query.status == "running":
                self._take_one(row.query, logits[index], tokens[index], finite[index])

    def _take_one(self, query: Query, logits: torch.Tensor, token: int, finite: bool) -> None:
        if self.on_logits is not None:
            self.on_logits(query, logits)
        if not finite:
            self.fail(
                query,
                FloatingPointError(
                    f"relay: logits of query {query.id} must be finite, got NaN or infinity for "
                    f"its token {len(query.tokens)}; are the weights finite?"
                ),
            )
            return
        if not query._sampler.greedy:
            done, token = self.attempt(query, "sampling", query._sampler.sample, logits)
            if not done:
                return
        self._record(query, token)
        done, reason = self.attempt(query, "tokenizer", query._stopper.push, query.tokens)
        if done and reason is None and len(query.tokens) == query.max_new_tokens:
            reason = "length"
        try:
            if query._on_token is not None:
                self.attempt(query, "on_token", query._on_token, query, token)
        finally:
            # Whatever a callback does, Ctrl-C included: a query gets no token after its last one.
            if reason is not None and not query.ended:
                self.end(query, "finished", reason)

    def _record(self, query: Query, token: int) -> None:
        now = self.clock()
        query.cached += 1
        if query.tokens:
            self.counters.time_per_token.add(now - query.token_times[-1])
        else:
            query.first_token = now
            self.counters.prefills += 1
            self.counters.time_to_first_token.add(now - query.submitted)
            self.timeline.begin(query.id, query.slot, "decode", now)
        query.tokens.append(token)
        query.token_times.append(now)
        self.counters.output_tokens += 1


def _drop_tracebacks(error: BaseException | None) -> None:
    """Let go of the frames that an error and its causes came through, and of their tensors."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _explained(text: str, cause: Exception) -> RuntimeError:
    error = RuntimeError(f"relay: {text}")
    error.__cause__ = cause
    return error
