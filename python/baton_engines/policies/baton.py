"""BATON: a query enters as soon as a row is free, and its prompt joins the running batch's forward.

A finished query never delays the batch. What is left to decide is how to compute the newcomer's
prompt. The paper computes it separately between two decode steps, which reads the weights once more
and makes all running queries wait. Here its tokens join the forward of the decoding queries, up to

    tokens of the forward = max(free, min(frugal, efficient))

where *free* is the largest number that takes hardly longer than decoding by itself, *frugal* the
smallest at which a query takes hardly longer than it would with more, and *efficient* the smallest
at which a token does (`token_budget`). All three follow from the cost of forwards, which is fitted
while they run (`costs`), and from the lengths of the queries that have ended. A bound on the time
between two tokens of a query reduces chunks to what is predicted to fit.
Source: BATON (arXiv 2410.18701) for handing on slots and for `join="never"`; Sarathi-Serve
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
from .token_budget import efficient_tokens, frugal_tokens

JOINS = ("auto", "never")
# Tokens of a forward until something is known about costs.
FIRST = 256
# Prompt tokens that join decoders under a bound on their wait, until something is known.
FIRST_BOUNDED = 8
# How many times as large as the largest forward so far the next one may be. Costs far beyond what
# was seen are unreliable, the first ones by a factor of 4, and all decoders wait for a forward that
# is too large.
GROWTH = 1.25
# A forward may always take this many times as long as without prompts.
FREE = 1.1
# The share of a new result of the search, as a factor, that is adopted at a time: the curves are
# flat, so small errors of fitted costs move the result far.
ADOPTED = 0.25
# The lengths of this many ended queries predict those of the next ones. While fewer than KNOWN have
# ended, what waiting and running queries say about themselves counts too.
REMEMBERED, KNOWN = 64, 8


class Baton(Policy):
    """Prompts join the forward of the queries that decode.

    Args:
        max_prefill_tokens: the most prompt tokens of a forward; bounds its memory.
        max_stall_tokens: the most prompt tokens that decoding queries wait for; None for as many as
            pay off. A longer prompt comes in chunks, or whole in a separate forward where prompts
            have to be whole: in an aligned cache and under dynamic RoPE. Prompts that are computed
            elsewhere stall no query and are not bounded.
        max_token_gap: seconds; prompts join in chunks with which a forward is predicted to stay
            within this time, but at least with one token, and whole where they have to be whole.
            None: no bound.
        join: "auto": prompts that are computed in the loop join the decoders. "never": they are
            computed between two steps, as in the paper. Prompts that `prefill` computes elsewhere
            never join.
        costs: the seconds of a forward as a function of its `Work`, fixed. None: fitted to the
            forwards that run, so that plans depend on the clock; under tensor parallelism, where
            all ranks have to plan alike, the relay then uses 256 tokens per forward.
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
        self._wanted: tuple[object, int] = (None, FIRST)

    def observe(self, work: Work, seconds: float) -> None:
        """A forward of that work took this long."""
        if self._fitted is not None and self.join != "never":
            self._fitted.observe(work, seconds)

    def note_end(self, query: Query) -> None:
        """The lengths of ended queries predict those of the next ones."""
        if query.tokens:
            self._ended.append((len(query.prompt), len(query.tokens)))

    def plan(self, view: View) -> Plan:
        """Fill free rows; their prompts join the decoders or are computed before them."""
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
        known = self._fitted is None or self._fitted.ready
        if known:
            wanted = self._wanted_tokens(view) - len(decoders)
            if self._fitted is not None:
                largest = int(GROWTH * self._fitted.largest)
                most = max(1, min(most, largest - len(decoders)))
                wanted = max(wanted, self._fitted.smallest // 2 - len(decoders))
            if decoders and wanted < most:
                bound = FREE * self._seconds(base)
                wanted = max(wanted, self._fits(queue, base, most, bound, least=wanted))
        else:
            wanted = FIRST - len(decoders)
        room = max(1, min(wanted, most))
        if decoders and self.max_token_gap is not None:
            if not known:
                return min(room, FIRST_BOUNDED)
            bound = self.max_token_gap
            if self._fitted is not None:
                bound /= self._fitted.spread
            room = max(1, self._fits(queue, base, room, bound))
        return room

    def _fits(
        self, queue: Sequence[Query], base: Work, most: int, bound: float, least: int = 0
    ) -> int:
        """The most prompt tokens, from `least` to `most`, with which a forward is predicted to stay
        within the bound; `least` if no larger number does."""

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

    def _wanted_tokens(self, view: View) -> int:
        """The tokens of a forward that pay off: min(frugal, efficient), approached from `FIRST` if
        costs are fitted."""
        prompt, answer = self._lengths(view)
        # In steps of a fifth: the search is repeated only if lengths or costs change noticeably.
        step = round(4 * log2(prompt)), round(4 * log2(answer))
        version = None if self._fitted is None else self._fitted.version
        key = (version, view.num_slots, step)
        if key != self._wanted[0]:
            prompt, answer = (2 ** (quarter / 4) for quarter in step)
            frugal = frugal_tokens(self._seconds_of, view.num_slots, prompt, answer)
            if self._fitted is None:
                tokens = min(frugal, efficient_tokens(self._seconds_of))
            else:
                most = int(GROWTH * self._fitted.largest)
                tokens = min(frugal, efficient_tokens(self._seconds_of, most))
                before = self._wanted[1]
                tokens = round(before * (tokens / before) ** ADOPTED)
            self._wanted = key, tokens
        return self._wanted[1]

    def _seconds_of(self, tokens: int) -> float:
        return self._seconds(Work(tokens))

    def _lengths(self, view: View) -> tuple[float, float]:
        """The mean number of tokens of a prompt and of an answer."""
        lengths = list(self._ended)
        if len(lengths) < KNOWN:
            # The upper limit says little about the answer's length, but nothing better is known.
            there = islice(chain(view.running, view.waiting), KNOWN)
            lengths += [(len(query.prompt), query.max_new_tokens) for query in there]
        prompts, answers = zip(*lengths, strict=True)
        return max(1.0, sum(prompts) / len(lengths)), max(1.0, sum(answers) / len(lengths))

    def _apart(self, view: View) -> Plan:
        """Prompts up to the allowed stall, then one decode step of all running queries."""
        candidates, queue, _ = self._sorted(view)
        room = None
        if not view.prefills_elsewhere and any(not query.prompt_left for query in view.running):
            room = self.max_stall_tokens
        chunks = take_chunks(queue, room, whole=view.whole_prompts)
        prefills = pack_chunks(chunks, self.max_prefill_tokens)
        return Plan(admit=_begun(candidates, chunks), forwards=(*prefills, Forward(decode=True)))

    def _sorted(self, view: View) -> tuple[tuple[Query, ...], list[Query], list[Query]]:
        """The queries that could enter; all queries that have a prompt to compute, in the order in
        which they do; all decoding queries."""
        order = self.admission.order(view)
        candidates = fitting(view, order, view.num_free, reserve_all=False)
        there = (*view.running, *candidates)
        queue = [query for query in there if query.prompt_left]
        return candidates, queue, [query for query in there if not query.prompt_left]


def _begun(candidates: Sequence[Query], chunks: Sequence[tuple[Query, int]]) -> tuple[Query, ...]:
    """The queries for which something is computed. A query without anything left to prefill only
    needs its row."""
    begun = {query.id for query, _ in chunks}
    return tuple(query for query in candidates if query.id in begun or not query.prompt_left)
