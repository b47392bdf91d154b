"""The state of a relay: its queries by status, the slots they hold, and the counters.

Every query that has not ended is in exactly one of `waiting`, `running` and `parked`. The decode
loop and the prompts in flight both change this state, and only through the methods here. An error
in a forward, a callback or a tokenizer ends only the query to which it belongs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, ParamSpec, TypeVar

import torch

from ..policies import Policy
from ..query import Query, wait_in_order
from ..query.callbacks import call, give_text
from ..query.errors import drop_tracebacks, explained, is_failure
from ..query.sampling import Choice, choose_next
from ..slots import Row, Slots
from .counters import Counters, Timeline

_log = logging.getLogger(__name__)

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Done(Generic[_Result]):
    """The result of an attempt that succeeded."""

    result: _Result


class Batch:
    """Queries by status, and the methods that move them.

    Args:
        slots: the cache and its rows.
        policy: chooses which query is parked when memory is short, and is told when queries end.
        clock: returns seconds.
        on_end: called with every query that ends.

    Attributes:
        waiting, running, parked: the queries by id; running ones in order of admission, waiting
            ones in order of submission.
        counters: what has been done.
        timeline: which query held which slot when.
        on_leave: called with every query that is parked or ends, before its row is given back.
        on_logits: called with a query and its logits, float32 [vocab], before a token is chosen
            from them; may be None.
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
        self.on_leave: Callable[[Query], object] = lambda query: None
        self.on_logits: Callable[[Query, torch.Tensor], object] | None = None
        self.waiting: dict[int, Query] = {}
        self.running: dict[int, Query] = {}
        self.parked: dict[int, Query] = {}
        self.counters = Counters()
        self.timeline = Timeline()
        # The counts of cache and slots that `counters` already includes.
        self._seen = (0, 0, 0, 0)

    def place(self, query: Query) -> dict[int, Query] | None:
        """The dict, `waiting`, `running` or `parked`, that holds the query; None if it has
        ended."""
        for queries in (self.waiting, self.running, self.parked):
            if queries.get(query.id) is query:
                return queries
        if query.ended:
            return None
        raise ValueError(f"Relay: query must be one of this relay's, got {query!r}")

    def wait(self, query: Query) -> None:
        """Put a query among those that wait, in order of submission; it must not be elsewhere."""
        wait_in_order(self.waiting, query)

    def admit(self, query: Query) -> None:
        """Let a waiting query run; it has no row yet."""
        del self.waiting[query.id]
        self.running[query.id] = query
        query.status = "running"

    def enter(self, query: Query, length: int) -> bool:
        """Give a running query a row of `length` tokens. If that fails, the query fails: False."""
        had_parked = query.parked_kv is not None
        entered = self.attempt(query, "insertion", self.slots.enter, query, length) is not None
        self.counters.insertions += entered and had_parked
        return entered

    def unseat(self, query: Query) -> None:
        """Take away a running query's row; it waits again, with keys and values in host memory."""
        self.on_leave(query)
        # While its prompt is computed elsewhere, a row holds nothing to park.
        had_row = self.slots.length(query) > 0
        self.slots.park(query)
        counters = self.counters
        counters.preemptions += had_row
        counters.peak_parked_bytes = max(counters.peak_parked_bytes, self.slots.parked_bytes)
        self.timeline.end(query.id, self.clock())
        del self.running[query.id]
        self.wait(query)

    def park(self, query: Query) -> None:
        """Keep a query out of waiting and running until `unpark`, with keys and values in host
        memory."""
        if query.id in self.running:
            self.unseat(query)
        del self.waiting[query.id]
        query.status = "parked"
        self.parked[query.id] = query

    def unpark(self, query: Query) -> None:
        """Let a parked query wait again."""
        del self.parked[query.id]
        self.wait(query)

    def make_room(self, rows: list[Row]) -> list[Row]:
        """Unseat queries until the rows' needs fit the budget; returns the remaining rows."""
        while not self.slots.fits(rows):
            victim = self.policy.victim(self.running.values())
            if self.running.get(victim.id) is not victim:
                raise ValueError(
                    f"Relay.step: victim of {self.policy.name} must be a running query, "
                    f"got {victim!r}"
                )
            self.unseat(victim)
            rows = [row for row in rows if row.query is not victim]
        return rows

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; rows beyond it move, or wait again if no slot is free."""
        # Queries that were admitted in this step and have no row yet are the first to wait again.
        in_order = sorted(self.running.values(), key=lambda q: (q.slot is None, q.slot or 0))
        for query in in_order[num_slots:]:
            self.unseat(query)
        for query in in_order[:num_slots]:
            if query.slot is not None and query.slot >= num_slots:
                self.attempt(query, "relocation", self.slots.relocate, query)
        self.counters.resizes += num_slots != self.slots.num_slots
        self.slots.cache.resize(num_slots)
        self.count_bytes()

    def end(self, query: Query, status: str, reason: str, error: Exception | None = None) -> None:
        """Remove the query from wherever it is and release everything but its results."""
        for queries in (self.waiting, self.running, self.parked):
            queries.pop(query.id, None)
        self.on_leave(query)
        if status != "failed":
            self._keep_prefix(query, query.cached)
        self.slots.leave(query)
        now = self.clock()
        query.end(status, reason, now, error)
        self.timeline.end(query.id, now)
        setattr(self.counters, status, getattr(self.counters, status) + 1)
        self.policy.note_end(query)
        self.on_end(query)

    def fail(self, query: Query, error: Exception) -> None:
        """End the query with an error, unless it has ended."""
        if query.ended:
            return
        _log.info("query %d failed", query.id, exc_info=error)
        drop_tracebacks(error)
        self.end(query, "failed", "error", error)

    def attempt(
        self,
        query: Query,
        what: str,
        function: Callable[_Arguments, _Result],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> Done[_Result] | None:
        """Call something that only this query needs; if it raises, the query fails: None."""
        try:
            return Done(function(*args, **kwargs))
        except BaseException as cause:
            if not is_failure(cause):
                raise
            self.fail(
                query,
                explained(f"{what} of query {query.id} must not raise, got {cause!r}", cause),
            )
            return None

    def choose(
        self, rows: Sequence[Row], logits: torch.Tensor, likeliest: Sequence[int] | None = None
    ) -> list[Choice]:
        """Choose the next token of every row whose prompt is complete; a query whose options cannot
        be applied fails.

        Args:
            rows: the rows that were computed.
            logits: [rows, vocab], after the last token of every row.
            likeliest: the arg max of every row, -1 where the logits are not finite; None if not
                known yet. Only for rows whose prompts are complete.
        """
        queries = [row.query for row in rows]
        ready = [row.num_tokens >= row.query.prompt_left for row in rows]
        try:
            return choose_next(queries, ready, logits, likeliest)
        except Exception as error:
            _log.info("choosing tokens of %d rows failed", len(rows), exc_info=error)
        choices = []
        for query, is_ready, own in zip(queries, ready, logits.split(1), strict=True):
            done = self.attempt(query, "sampling", choose_next, [query], [is_ready], own)
            choices.append(Choice(False) if done is None else done.result[0])
        return choices

    def take(self, rows: Sequence[Row], logits: torch.Tensor, choices: Sequence[Choice]) -> None:
        """Give every row whose prompt is complete its next token.

        Args:
            rows: the rows that were computed.
            logits: [rows, vocab], after the last token of every row.
            choices: the result of `choose` for them.
        """
        complete = [row.num_tokens >= row.query.prompt_left for row in rows]
        for row, done in zip(rows, complete, strict=True):
            # The last token of a row counts once the token that follows it is delivered. Until then
            # it may be computed again.
            row.query.cached += row.num_tokens - done
        for index, row in enumerate(rows):
            # A callback of another row may have cancelled or preempted this one.
            if complete[index] and row.query.status == "running":
                if choices[index].finite:
                    self._share_prompt(row.query, logits[index])
                # The callbacks of the other queries may have done the same.
                if row.query.status == "running":
                    self._take_one(row.query, logits[index], choices[index])

    def _share_prompt(self, query: Query, logits: torch.Tensor) -> None:
        """Give queries with the same prompt their first tokens; they copy its row later."""
        shared = query.shared_prompt
        if shared is None or shared.ready or shared.leader is not query:
            return
        others = shared.offer()
        rows = [Row(other, 1) for other in others]
        choices = self.choose(rows, logits.repeat(len(rows), 1))
        for other, choice in zip(others, choices, strict=True):
            if not other.ended:
                self._take_one(other, logits, choice)

    def _take_one(self, query: Query, logits: torch.Tensor, choice: Choice) -> None:
        if self.on_logits is not None:
            self.on_logits(query, logits.float())
        if not choice.finite:
            self.fail(
                query,
                FloatingPointError(
                    f"Relay: logits of query {query.id} must be finite, got NaN or infinity for "
                    f"its token {len(query.tokens)}; are the weights finite?"
                ),
            )
            return
        if not query.tokens:
            self._keep_prefix(query, len(query.prompt))
        self._record(query, choice)
        serving = query.serving
        pushed = self.attempt(query, "tokenizer", serving.stopper.push, query.tokens)
        if pushed is None:
            return
        reason = pushed.result
        if reason is None and len(query.tokens) == query.max_new_tokens:
            reason = "length"
        try:
            if serving.on_token is not None:
                self.attempt(query, "on_token", call, serving.on_token, query, choice.token)
            if serving.listener is not None and not query.ended:
                listener, is_last = serving.listener, reason is not None
                self.attempt(query, "on_text", give_text, query, listener, is_last)
        finally:
            # Even if a callback raised, also Ctrl-C: a query gets no token after its last one.
            if reason is not None and not query.ended:
                self.end(query, "finished", reason)

    def _keep_prefix(self, query: Query, num_tokens: int) -> None:
        # A cancelled query may still be computing its prompt, or may not have a row.
        self.slots.keep_prefix(query, min(num_tokens, self.slots.length(query)))

    def _record(self, query: Query, choice: Choice) -> None:
        now = self.clock()
        query.cached += 1
        if query.tokens:
            self.counters.time_per_token.add(now - query.token_times[-1])
        else:
            query.first_token = now
            self.counters.time_to_first_token.add(now - query.submitted)
            # A query that shares another one's prompt gets its first token before it has a row.
            self.counters.prefills += query.slot is not None
            self.begin_span(query, "decode", now)
        query.tokens.append(choice.token)
        if query.logprobs is not None and choice.logprobs is not None:
            query.logprobs.append(choice.logprobs)
        query.token_times.append(now)
        self.counters.output_tokens += 1

    def begin_span(self, query: Query, kind: str, now: float) -> None:
        """From now on the query computes in its slot, if it has one; see `Timeline.begin`."""
        if query.slot is not None:
            self.timeline.begin(query.id, query.slot, kind, now)

    def note_peak_kv_bytes(self) -> None:
        """Update the largest amount of keys and values that the rows have held."""
        counters = self.counters
        counters.peak_kv_bytes = max(counters.peak_kv_bytes, self.slots.cache.bytes_in_use)

    def count_bytes(self) -> None:
        """Add what cache and slots have counted since the last call."""
        slots, counters, last = self.slots, self.counters, self._seen
        seen = (
            slots.cache.bytes_moved,
            slots.parking_bytes,
            slots.reused_tokens,
            slots.reusing_queries,
        )
        counters.shaping_bytes += seen[0] - last[0]
        counters.parking_bytes += seen[1] - last[1]
        counters.reused_tokens += seen[2] - last[2]
        counters.reusing_queries += seen[3] - last[3]
        self._seen = seen
