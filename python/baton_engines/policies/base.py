"""What every policy is, and what most of them share: how many queries fit, prompts packed."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

from ..query import Query
from .admission import Admission, FirstCome
from .costs import Work
from .plan import Forward, Plan, View

# Tokens that a query which counts with only its prompt may grow before room is needed again. An
# admission that leaves no such room is undone a few steps later, and copies the query out and in.
HEADROOM = 16


class Policy(ABC):
    """Decides what a relay does next. One object serves one relay, so it may keep state.

    A plan need not be carried out to the end: a callback can cancel a query, its prefill can fail,
    Ctrl-C can end an iteration, the budget of bytes can be used up by then. So a plan is made from
    the view only: a running query that has `prompt_left` is to be prefilled. When nothing runs and
    something waits, a plan admits something, unless more is to come.

    Attributes:
        admission: the order in which queries enter; its last one is the first to be parked when the
            budget would be exceeded.
        pads: whether it plans padded forwards: the cache then has columns for the padding.
        splits_prompts: whether it cannot do without computing prompts in parts; such a policy is
            refused where they have to be computed whole.
        needs_times: whether it cannot do without `observe`; such a policy is refused under tensor
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

    # Nothing to do for those that do not ask.
    def observe(self, work: Work, seconds: float) -> None:  # noqa: B027
        """A forward was run; not called under tensor parallelism, whose ranks have clocks of their
        own.

        Args:
            work: what it computed.
            seconds: until its tokens were delivered, what the loop did before it included.
        """

    def note_end(self, query: Query) -> None:  # noqa: B027
        """A query has ended, however it did."""

    def victim(self, running: Collection[Query]) -> Query:
        """Who is parked when the running queries outgrow the budget of bytes."""
        return self.admission.last(running)


def fitting(
    view: View, candidates: Iterable[Query], num_rows: int, *, reserve_all: bool
) -> tuple[Query, ...]:
    """The first of the candidates, as many as there are rows and room in the budget for.

    A candidate that does not fit keeps those behind it out: they could starve it.

    Args:
        view: the relay.
        candidates: waiting queries, those to be admitted first in front.
        num_rows: the most queries.
        reserve_all: whether a query, running or not, counts with all the tokens it may ever have,
            so that none is ever parked; else with its prompt and what it has.
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
    """As much of the prompts as there is room for, one query after the other.

    Args:
        queries: in the order in which they are served.
        room: the most tokens; None for all there are.
        whole: whether prompts are taken whole; the first one then even without room.
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
