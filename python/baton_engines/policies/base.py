"""The base class of policies, and what most of them share: how many queries fit, packing
prompts."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from ..query import Query
from .admission import Admission, FirstCome
from .costs import Work
from .plan import Forward, Plan, View

# If a query counts with its prompt only, leave room for this many more tokens. Otherwise the query
# might be parked again a few steps after its admission, which copies it out and in.
HEADROOM = 16


class Policy(ABC):
    """Decides what a relay does next. One object serves one relay, so it may keep state.

    A plan is not always carried out completely: a callback may cancel a query, its prefill may
    fail, Ctrl-C may end an iteration, or the byte budget may be used up by then. So a plan must be
    made from the view only: a running query with `prompt_left` still needs prefilling. When nothing
    runs and something waits, a plan must admit something, unless more queries are to come.

    Attributes:
        admission: the order in which queries enter; the last query in this order is the first to be
            parked when the budget would be exceeded.
        pads: whether it plans padded forwards: the cache then has columns for the padding.
        splits_prompts: whether it has to compute prompts in parts; such a policy is rejected where
            prompts have to be computed whole.
        needs_times: whether it depends on `observe`; such a policy is rejected under tensor
            parallelism, where every rank plans for itself and all have to plan alike.
    """

    name: str
    admission: Admission = FirstCome()
    pads: bool = False
    splits_prompts: bool = False
    needs_times: bool = False

    @abstractmethod
    def plan(self, view: View) -> Plan:
        """The next iteration."""

    # Policies that do not need the times do nothing.
    def observe(self, work: Work, seconds: float) -> None:  # noqa: B027
        """Called after a forward, but not under tensor parallelism, because the ranks' clocks
        differ.

        Args:
            work: what it computed.
            seconds: until its tokens were delivered, including the loop's work before it.
        """

    def note_end(self, query: Query) -> None:  # noqa: B027
        """Called when a query has ended for any reason."""

    def victim(self, running: Collection[Query]) -> Query:
        """The query to park when the running queries outgrow the byte budget."""
        return self.admission.last(running)


def fitting(
    view: View, candidates: Iterable[Query], num_rows: int, *, reserve_all: bool
) -> tuple[Query, ...]:
    """The first candidates for which there are rows and room in the budget.

    A candidate that does not fit keeps out those behind it; otherwise they could starve it.

    Args:
        view: the relay.
        candidates: waiting queries, in order of admission.
        num_rows: the largest number of queries.
        reserve_all: whether each query, running or not, counts with all the tokens it may ever
            have, so that none is ever parked; else with its prompt and what it has.
    """
    chosen: list[Query] = []
    room = None
    if view.kv_budget is not None:
        room = view.kv_budget // view.bytes_per_token
        room -= sum(_tokens_of(query, reserve_all) for query in view.running)
    for query in candidates:
        if len(chosen) >= num_rows:
            break
        if room is not None:
            room -= _tokens_of(query, reserve_all)
            if room < 0:
                break
        chosen.append(query)
    return tuple(chosen)


def _tokens_of(query: Query, reserve_all: bool) -> int:
    if reserve_all:
        return query.max_cached
    return min(query.max_cached, max(len(query.prompt), query.cached) + HEADROOM)


def pack_prefills(queries: Iterable[Query], max_tokens: int) -> tuple[Forward, ...]:
    """Forwards that prefill whole prompts, each of at most `max_tokens` tokens or of one query."""
    return pack_chunks(((query, query.prompt_left) for query in queries), max_tokens)


def pack_chunks(chunks: Iterable[tuple[Query, int]], max_tokens: int) -> tuple[Forward, ...]:
    """Forwards that prefill these chunks, each of at most `max_tokens` tokens or of one chunk."""
    forwards: list[Forward] = []
    room = 0
    for query, count in chunks:
        if not count:
            continue
        if not forwards or count > room:
            forwards.append(Forward())
            room = max_tokens
        forwards[-1] = Forward((*forwards[-1].prefill, (query, count)))
        room -= count
    return tuple(forwards)


def take_chunks(
    queries: Iterable[Query], room: int | None, *, whole: bool = False
) -> list[tuple[Query, int]]:
    """The parts of prompts for which there is room, one query after the other.

    Args:
        queries: in the order in which they are served.
        room: the largest number of tokens; None for no limit.
        whole: whether prompts are taken whole; the first is then taken even if it does not fit.
    """
    chunks: list[tuple[Query, int]] = []
    for query in queries:
        count = query.prompt_left
        if room is not None and count > room:
            count = room if not whole else 0 if chunks else count
        if count:
            chunks.append((query, count))
        if room is not None:
            room -= count
            if count < query.prompt_left or room <= 0:
                break
    return chunks


def positive(policy: Policy, **values: int) -> None:
    """Raises ValueError unless all values, which are arguments of the policy, are at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{type(policy).__name__}: {name} must be >= 1, got {value}")
