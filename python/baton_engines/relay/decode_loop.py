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

from ..policies import Forward, Plan, Policy, View
from ..query import Query
from ..query.callbacks import call, give_text
from ..query.errors import drop_tracebacks, explained, is_failure
from ..query.sampling import Choice, choose_next
from ..query.shared_prompt import is_held_back
from ..slots import Row, Slots
from .autoscale import Autoscale
from .counters import Counters, Timeline
from .in_flight import InFlight

_log = logging.getLogger(__name__)


class DecodeLoop:
    """Queries by status, and what moves them.

    Args:
        slots: the cache and its rows.
        policy: plans every iteration.
        clock: seconds.
        on_end: called with every query that ends.
        autoscale: changes the number of slots with the load; None to leave it.
        in_flight: the prompts that are computed elsewhere; None to compute all of them here.
    """

    def __init__(
        self,
        slots: Slots,
        policy: Policy,
        clock: Callable[[], float],
        on_end: Callable[[Query], object],
        autoscale: Autoscale | None = None,
        in_flight: InFlight | None = None,
    ):
        self.slots = slots
        self.policy = policy
        self.clock = clock
        self.on_end = on_end
        self.autoscale = autoscale
        self.in_flight = in_flight
        self.waiting: dict[int, Query] = {}
        self.running: dict[int, Query] = {}
        self.parked: dict[int, Query] = {}
        self.counters = Counters()
        self.timeline = Timeline()
        self.stepping = False
        # Queries of which a chunk was computed apart since the last step.
        self._chunked: set[int] = set()
        # What `Counters` has of the bytes that cache and slots count.
        self._bytes_seen = (0, 0)
        # Called with a query and its logits, float32 [vocab], before a token is chosen from them.
        self.on_logits: Callable[[Query, torch.Tensor], object] | None = None

    def iterate(self, more_to_come: bool = False) -> bool:
        """Carry out one plan; whether anything is left to do.

        Args:
            more_to_come: whether a policy may hold queries back until others are submitted.
        """
        if not self.waiting and not self.running:
            # The last one may have been cancelled between two steps.
            self._rest()
            return False
        self.stepping = True
        begin, num_threads = self.clock(), torch.get_num_threads()
        try:
            if self.in_flight is not None:
                self.in_flight.land(self)
            # What landed may have been all that was left, and ended with its first token.
            if self.waiting or self.running:
                self._autoscale()
                plan = self.policy.plan(self._view(begin, more_to_come))
                if not plan.admit and not self.running and more_to_come:
                    return False
                self._admit(plan)
                computed = [self._forward(forward, num_threads) for forward in plan.forwards]
                if self.in_flight and not any(computed):
                    self.in_flight.wait()
                    self.in_flight.land(self)
        finally:
            self.stepping = False
            if self.in_flight is not None:
                self.in_flight.take_cores_back(num_threads)
            seconds = self.clock() - begin
            self.counters.seconds += seconds
            self.counters.slot_seconds += seconds * self.slots.num_slots
            self._count_bytes()
        if self.waiting or self.running:
            return True
        self._rest()
        return False

    def _rest(self) -> None:
        """Give back the memory of rows while nobody needs one."""
        if self.autoscale is not None and self.slots.num_slots > self.autoscale.low:
            self.resize(self.autoscale.low)
        if self.slots.cache.bytes_committed:
            self.slots.cache.release()

    def resize(self, num_slots: int) -> None:
        """Change the number of slots; rows beyond it move, or wait again where none is free."""
        # Those that were admitted in this step and have no row yet are the first to wait again.
        in_order = sorted(self.running.values(), key=lambda q: (q.slot is None, q.slot or 0))
        for query in in_order[num_slots:]:
            self.unseat(query)
        for query in in_order[:num_slots]:
            if query.slot is not None and query.slot >= num_slots:
                self.attempt(query, "relocation", self.slots.relocate, query)
        self.counters.resizes += num_slots != self.slots.num_slots
        self.slots.cache.resize(num_slots)
        self._count_bytes()

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
        # A row whose prompt is away holds nothing.
        away = self.in_flight is not None and self.in_flight.forget(query)
        had_row = query.slot is not None and not away
        self.slots.park(query)
        self.counters.preemptions += had_row
        counters = self.counters
        counters.peak_parked_bytes = max(counters.peak_parked_bytes, self.slots.parked_bytes)
        self.timeline.end(query.id, self.clock())
        del self.running[query.id]
        self.wait(query)

    def end(self, query: Query, status: str, reason: str, error: Exception | None = None) -> None:
        """Take the query out wherever it is and let go of everything but its results."""
        for queries in (self.waiting, self.running, self.parked):
            queries.pop(query.id, None)
        if self.in_flight is not None:
            self.in_flight.forget(query)
        self.slots.leave(query)
        query.status, query.finish_reason, query.error = status, reason, error
        query.finished = self.clock()
        if query._stopper is not None:
            query._final_text = query._stopper.text
        query._sampler = query._stopper = query._on_token = None
        query._on_text = query._pieces = query.shared_prompt = None
        self.timeline.end(query.id, query.finished)
        setattr(self.counters, status, getattr(self.counters, status) + 1)
        self.on_end(query)

    def fail(self, query: Query, error: Exception) -> None:
        """End the query with an error, unless it has ended."""
        if query.ended:
            return
        _log.info("query %d failed", query.id, exc_info=error)
        drop_tracebacks(error)
        self.end(query, "failed", "error", error)

    def attempt(self, query: Query, what: str, function: Callable, *args) -> tuple[bool, object]:
        """Call what only this query needs: (True, result), or (False, None) and it has failed."""
        try:
            return True, function(*args)
        except BaseException as cause:
            if not is_failure(cause):
                raise
            self.fail(
                query,
                explained(f"{what} of query {query.id} must not raise, got {cause!r}", cause),
            )
            return False, None

    def _autoscale(self) -> None:
        if self.autoscale is None:
            return
        num_slots = self.slots.num_slots
        wanted = self.autoscale.wanted(num_slots, len(self.running), len(self.waiting))
        if wanted == num_slots:
            return
        try:
            self.resize(wanted)
        except MemoryError as error:
            # The rows that there are still do.
            _log.warning("no memory for %d slots, %d stay", wanted, num_slots, exc_info=error)

    def _count_bytes(self) -> None:
        seen = (self.slots.cache.bytes_moved, self.slots.parking_bytes)
        self.counters.shaping_bytes += seen[0] - self._bytes_seen[0]
        self.counters.parking_bytes += seen[1] - self._bytes_seen[1]
        self._bytes_seen = seen

    def _view(self, now: float, more_to_come: bool) -> View:
        cache = self.slots.cache
        return View(
            waiting=[query for query in self.waiting.values() if not is_held_back(query)],
            running=self.running.values(),
            num_slots=self.slots.num_slots,
            capacity=self.slots.capacity,
            bytes_in_use=cache.bytes_in_use,
            bytes_per_token=cache.bytes_per_token,
            now=now,
            kv_budget=self.slots.kv_budget,
            whole_prompts=self.slots.whole_prompts,
            more_to_come=more_to_come,
            prefills_elsewhere=self.in_flight is not None,
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
                if self.slots.fits([Row(query, 0)]):
                    self.enter(query, query.cached)
                else:
                    self.unseat(query)

    def enter(self, query: Query, length: int) -> bool:
        had_parked = query._parked_kv is not None
        entered, _ = self.attempt(query, "insertion", self.slots.enter, query, length)
        self.counters.insertions += entered and had_parked
        return entered

    def _forward(self, forward: Forward, num_threads: int) -> bool:
        """Compute a forward with what prompts elsewhere leave of the threads; whether there was
        anything to compute."""
        if self.in_flight is not None:
            self.in_flight.hand_over(self, forward)
            self.in_flight.share_cores(num_threads)
        rows = self.make_room(self._rows(forward))
        if not rows:
            return False
        taking_part = {query.id for query, _ in rows}
        stalled = [
            query for query in self.running.values() if query.tokens and query.id not in taking_part
        ]
        begin = self.clock()
        self.slots.reserve([row for row in rows if row.query.slot is not None])
        rows = [
            row
            for row in rows
            if row.query.slot is not None or self.enter(row.query, row.query.cached + row.count)
        ]
        counters = self.counters
        counters.peak_kv_bytes = max(counters.peak_kv_bytes, self.slots.cache.bytes_in_use)
        for query in stalled:
            self.timeline.end(query.id, begin)
        for query, _ in rows:
            self.timeline.begin(
                query.id, query.slot, "decode" if query.tokens else "prefill", begin
            )
        computed, logits = self._compute(rows, forward.padded)
        if not computed:
            return True
        # Rows that were tried alone, because one of them failed, had no padding.
        padded = forward.padded and computed == rows
        rows = computed
        choices = self.choose(rows, logits)
        now = self.clock()
        self._count(rows, padded, len(stalled), now - begin)
        for query in stalled:
            self.timeline.begin(query.id, query.slot, "decode", now)
        self.take(rows, logits, choices)
        return True

    def _rows(self, forward: Forward) -> list[Row]:
        rows = [
            Row(query, min(count, query.prompt_left))
            for query, count in forward.prefill
            if query.status == "running"
            and query.prompt_left
            and not (self.in_flight is not None and query in self.in_flight)
        ]
        if forward.decode:
            rows += [Row(query, 1) for query in self.running.values() if not query.prompt_left]
        # After an interruption some rows have their columns already. They catch up alone: in an
        # aligned cache no row can grow without the others.
        return [row for row in rows if self.slots.lagging(row.query)] or rows

    def make_room(self, rows: list[Row]) -> list[Row]:
        """Park queries until what the rows need fits the budget; the rows that are left."""
        while not self.slots.fits(rows):
            victim = self.policy.victim(self.running.values())
            if self.running.get(victim.id) is not victim:
                raise ValueError(
                    f"step: victim of {self.policy.name} must be a running query, got {victim!r}"
                )
            self.unseat(victim)
            rows = [row for row in rows if row.query is not victim]
        return rows

    def _compute(self, rows: Sequence[Row], padded: bool) -> tuple[list[Row], torch.Tensor | None]:
        """The rows that could be computed and their logits; the other queries have failed."""
        if len(rows) > 1:
            try:
                return list(rows), self.slots.compute(rows, padded=padded)
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

    def _count(self, rows: Sequence[Row], padded: bool, num_stalled: int, seconds: float) -> None:
        counters, shape = self.counters, self.slots.cache.shape
        prefilled = [(query.id, count) for query, count in rows if not query.tokens]
        tokens = sum(count for _, count in rows)
        padding = max(count for _, count in rows) * len(rows) - tokens if padded else 0
        counters.prompt_tokens += sum(count for _, count in prefilled)
        # The attention reads the valid columns of its rows and those of padding that is computed,
        # never the padding that aligns an aligned cache.
        counters.columns_read += sum(shape.length(query.slot) for query, _ in rows) + padding
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
        counters.slot_steps += self.slots.num_slots
        chunked = self._chunked.difference(query.id for query, _ in rows)
        counters.active_slot_steps += len(rows) + len(chunked.intersection(self.running))
        self._chunked.clear()
        prefilling = 0 if self.in_flight is None else len(self.in_flight.computing())
        counters.active_slot_steps += prefilling
        counters.prefilling_slot_steps += prefilling

    def choose(self, rows: Sequence[Row], logits: torch.Tensor) -> list[Choice]:
        """The next token of every row whose prompt is complete; a row whose options cannot be
        followed fails."""
        queries = [row.query for row in rows]
        ready = [row.count >= row.query.prompt_left for row in rows]
        try:
            return choose_next(queries, ready, logits)
        except Exception as error:
            _log.info("choosing tokens of %d rows failed", len(rows), exc_info=error)
        choices = []
        for query, is_ready, own in zip(queries, ready, logits.split(1), strict=True):
            done, result = self.attempt(query, "sampling", choose_next, [query], [is_ready], own)
            choices.append(result[0] if done else Choice(False))
        return choices

    def take(self, rows: Sequence[Row], logits: torch.Tensor, choices: Sequence[Choice]) -> None:
        """Give every row whose prompt is complete its next token.

        Args:
            rows: what was computed.
            logits: float32 [rows, vocab].
            choices: what `choose` made of them.
        """
        complete = [row.count >= row.query.prompt_left for row in rows]
        for row, done in zip(rows, complete, strict=True):
            # The last token of a row counts once the token that follows from it is delivered. Until
            # then it may be computed again.
            row.query.cached += row.count - done
        for index, row in enumerate(rows):
            # A callback of another row may have cancelled or preempted this one.
            if complete[index] and row.query.status == "running":
                self._take_one(row.query, logits[index], choices[index])

    def _take_one(self, query: Query, logits: torch.Tensor, choice: Choice) -> None:
        if self.on_logits is not None:
            self.on_logits(query, logits)
        if not choice.finite:
            self.fail(
                query,
                FloatingPointError(
                    f"relay: logits of query {query.id} must be finite, got NaN or infinity for "
                    f"its token {len(query.tokens)}; are the weights finite?"
                ),
            )
            return
        self._record(query, choice)
        done, reason = self.attempt(query, "tokenizer", query._stopper.push, query.tokens)
        if done and reason is None and len(query.tokens) == query.max_new_tokens:
            reason = "length"
        try:
            if query._on_token is not None:
                self.attempt(query, "on_token", call, query._on_token, query, choice.token)
            if query._on_text is not None:
                self.attempt(query, "on_text", give_text, query, reason is not None)
        finally:
            # Whatever a callback does, Ctrl-C included: a query gets no token after its last one.
            if reason is not None and not query.ended:
                self.end(query, "finished", reason)

    def _record(self, query: Query, choice: Choice) -> None:
        now = self.clock()
        query.cached += 1
        if query.tokens:
            self.counters.time_per_token.add(now - query.token_times[-1])
        else:
            query.first_token = now
            if query.shared_prompt is not None and query is query.shared_prompt.leader:
                query.shared_prompt.offer()
            self.counters.prefills += 1
            self.counters.time_to_first_token.add(now - query.submitted)
            self.timeline.begin(query.id, query.slot, "decode", now)
        query.tokens.append(choice.token)
        if choice.logprobs is not None:
            query.logprobs.append(choice.logprobs)
        query.token_times.append(now)
        self.counters.output_tokens += 1
