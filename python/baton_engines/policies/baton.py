"""BATON: a query enters as soon as a row is free, and its prompt joins the running batch's forward.

A finished query never holds the batch up. What is left to decide is how the newcomer's prompt is
computed. The paper computes it apart, between two decode steps, which reads the weights once more
and lets everybody wait. Here its tokens join the forward of the queries that decode, so many at a
time that

    tokens of the forward = max(free, frugal)

where *free* is the most that takes next to no longer than the decoders by themselves, and *frugal*
the fewest at which a query takes next to no longer than it would with more (`token_budget`). Both
follow from what forwards cost, which is fitted while they run (`costs`), and from the lengths of
the queries that have ended. A bound on the time between two tokens of a query cuts chunks down to
what is predicted to fit.
Source: BATON (arXiv 2410.18701) for the handing on of slots, and for `join="never"`; Sarathi-Serve
(OSDI'24) for chunks together with decoders; the sizes are ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, islice
from math import log2

from ..query import Query
from .admission import Admission, get_admission
from .base import Policy, fitting, pack_chunks, positive, take_chunks
from .costs import FittedCosts, Work
from .plan import Forward, Plan, View
from .token_budget import frugal_tokens

JOINS = ("auto", "never")
# Tokens of a forward while too little is known of its costs: the first fits vary by a factor of 4,
# too small a forward leaves slots empty, and all decoders wait for too large a one.
FIRST = 256
# Prompt tokens that join decoders who wait no longer than a bound, while nothing is known.
FIRST_BOUNDED = 8
# How much longer than without prompts a forward may take at any rate.
FREE = 1.1
# Queries whose lengths the next ones are taken to have, and below how many of them what the queries
# that are there say counts too.
REMEMBERED, KNOWN = 64, 8


class Baton(Policy):
    """Prompts join the forward of the queries that decode.

    Args:
        max_prefill_tokens: the most prompt tokens of a forward; bounds its memory.
        max_stall_tokens: the most prompt tokens that queries which decode wait for, None for those
            that pay. A longer prompt comes in chunks, or whole in a separate forward where prompts
            have to be whole: in an aligned cache and under dynamic RoPE. Prompts that are computed
            elsewhere stall nobody, and are not bounded.
        max_token_gap: seconds; prompts join in chunks that keep a forward within it, as predicted,
            but at least by a token, and whole where they have to be whole. None: no bound.
        join: "auto": prompts that are computed in the loop join the decoders. "never": they are
            computed between two steps, as in the paper. Those that `prefill` computes elsewhere
            never join.
        costs: seconds of a forward by its `Work`, for good. None: fitted to the forwards that run,
            so that plans depend on the clock; a relay under tensor parallelism, all of whose ranks
            have to plan alike, then leaves forwards at 256 tokens.
        admission: one of `ADMISSIONS`, or an `Admission`.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "baton"

    def __init__(
        self,
        max_prefill_tokens: int = 2048,
        max_stall_tokens: int | None = None,
        max_token_gap: float | None = None,
        *,
        join: str = "auto",
        costs: Callable[[Work], float] | None = None,
        admission: str | Admission = "fcfs",
    ):
        positive(self, max_prefill_tokens=max_prefill_tokens)
        if max_stall_tokens is not None:
            positive(self, max_stall_tokens=max_stall_tokens)
        if join not in JOINS:
            raise ValueError(f"Baton: join must be one of {', '.join(JOINS)}, got {join!r}")
        if max_token_gap is not None and not max_token_gap > 0:
            raise ValueError(f"Baton: max_token_gap must be above 0, got {max_token_gap}")
        if max_token_gap is not None and join == "never":
            raise ValueError(
                f"Baton: max_token_gap must be None for join 'never', got {max_token_gap}"
            )
        self.max_prefill_tokens = max_prefill_tokens
        self.max_stall_tokens = max_stall_tokens
        self.max_token_gap = max_token_gap
        self.join = join
        self.admission = get_admission(admission)
        self._fitted: FittedCosts | None = None
        if costs is None:
            self._fitted = FittedCosts()
            costs = self._fitted.seconds
            self.needs_times = max_token_gap is not None
        self._seconds = costs
        self._ended: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)
        self._frugal: tuple[object, int] = (None, 0)

    def observe(self, work: Work, seconds: float) -> None:
        """A forward took that long."""
        if self._fitted is not None and self.join != "never":
            self._fitted.observe(work, seconds)

    def note_end(self, query: Query) -> None:
        """The next queries are taken to be as long as those that have ended."""
        if query.tokens:
            self._ended.append((len(query.prompt), len(query.tokens)))

    def plan(self, view: View) -> Plan:
        """Fill free rows; their prompts join the decoders, or go before them."""
        if self.join == "never" or view.prefills_elsewhere:
            return self._apart(view)
        return self._joint(view)

    def _joint(self, view: View) -> Plan:
        candidates, queue, decoders = self._sorted(view)
        chunks: list[tuple[Query, int]] = []
        if queue:
            room = self._room(view, queue, decoders)
            chunks = take_chunks(queue, room, whole=view.whole_prompts)
        forward = Forward(tuple(chunks), decode=True)
        return Plan(admit=_begun(candidates, chunks), forwards=(forward,))

    def _room(self, view: View, queue: Sequence[Query], decoders: Sequence[Query]) -> int:
        """How many prompt tokens join the decoders, at least 1."""
        most = min(sum(query.prompt_left for query in queue), self.max_prefill_tokens)
        if decoders and self.max_stall_tokens is not None:
            most = min(most, self.max_stall_tokens)
        base = Work.of((), decoders)
        if self._fitted is None or self._fitted.settled:
            wanted = self._frugal_tokens(view) - len(decoders)
            if self._fitted is not None:
                # What lies far beyond all that was seen is not predicted well.
                most = max(1, min(most, 2 * self._fitted.largest - len(decoders)))
                wanted = max(wanted, self._fitted.smallest // 2 - len(decoders))
            if decoders and wanted < most:
                bound = FREE * self._seconds(base)
                wanted = max(wanted, self._fits(queue, base, most, bound, least=wanted))
        else:
            wanted = FIRST - len(decoders)
        room = max(1, min(wanted, most))
        if decoders and self.max_token_gap is not None:
            if self._fitted is not None and not self._fitted.ready:
                return min(room, FIRST_BOUNDED)
            bound = self.max_token_gap
            if self._fitted is not None:
                bound /= self._fitted.spread
            room = max(1, self._fits(queue, base, room, bound))
        return room

    def _fits(
        self, queue: Sequence[Query], base: Work, most: int, bound: float, least: int = 0
    ) -> int:
        """The most prompt tokens, up to `most`, with which a forward takes no longer than the
        bound; or `least`, where it does with the next one already."""

        def within(count: int) -> bool:
            prompts = Work.of(take_chunks(queue, count), ())
            return self._seconds(base.plus(prompts)) <= bound

        if within(most):
            return most
        low, high = max(least, 0), most
        if low and not within(min(low + 1, most)):
            return low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle) else (low, middle)
        return low

    def _frugal_tokens(self, view: View) -> int:
        prompt, answer = self._lengths(view)
        # Steps of a fifth: the search is worth repeating only for other lengths, or other costs.
        step = round(4 * log2(prompt)), round(4 * log2(answer))
        version = None if self._fitted is None else self._fitted.version
        key = (version, view.num_slots, step)
        if key != self._frugal[0]:
            prompt, answer = (2 ** (quarter / 4) for quarter in step)
            tokens = frugal_tokens(
                lambda tokens: self._seconds(Work(tokens)), view.num_slots, prompt, answer
            )
            self._frugal = key, tokens
        return self._frugal[1]

    def _lengths(self, view: View) -> tuple[float, float]:
        """Tokens of a prompt and of an answer, in the mean."""
        lengths = list(self._ended)
        if len(lengths) < KNOWN:
            # The most that is allowed says the least of an answer, but there is nothing better.
            there = islice(chain(view.running, view.waiting), KNOWN)
            lengths += [(len(query.prompt), query.max_new_tokens) for query in there]
        prompts, answers = zip(*lengths, strict=True)
        return max(1.0, sum(prompts) / len(lengths)), max(1.0, sum(answers) / len(lengths))

    def _apart(self, view: View) -> Plan:
        """Prompts as far as the stall allows, then one decode step of all."""
        candidates, queue, _ = self._sorted(view)
        room = None
        if not view.prefills_elsewhere and any(not query.prompt_left for query in view.running):
            room = self.max_stall_tokens
        chunks = take_chunks(queue, room, whole=view.whole_prompts)
        prefills = pack_chunks(chunks, self.max_prefill_tokens)
        return Plan(admit=_begun(candidates, chunks), forwards=(*prefills, Forward(decode=True)))

    def _sorted(self, view: View) -> tuple[tuple[Query, ...], list[Query], list[Query]]:
        """Those that could enter; all that have a prompt to compute, in the order in which they do;
        all that decode."""
        order = self.admission.order(view)
        candidates = fitting(view, order, view.num_free, reserve_all=False)
        there = (*view.running, *candidates)
        queue = [query for query in there if query.prompt_left]
        return candidates, queue, [query for query in there if not query.prompt_left]


def _begun(candidates: Sequence[Query], chunks: Sequence[tuple[Query, int]]) -> tuple[Query, ...]:
    """Those that something is computed of. One that has nothing left to prefill only needs its
    row."""
    begun = {query.id for query, _ in chunks}
    return tuple(query for query in candidates if query.id in begun or not query.prompt_left)
