"""What a policy sees and what it says: the one interface between the relay and its scheduling.

Once per iteration the relay asks `Policy.plan` which queries give up their row, which waiting ones
enter, and which forwards compute what. The relay does as it is told and knows no policy by name:
prefill apart or in one forward with the decoders, padded or not, whole prompts or chunks, first
come first served or any other order, are all plans.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..query import Query
from .admission import Admission, FirstCome

# Tokens that a query which counts with its prompt alone may grow before room is asked for again. An
# admission that leaves no such room is undone a few steps later, and copies the query out and in.
HEADROOM = 16


@dataclass(frozen=True)
class View:
    """The relay between two iterations; for reading, and only until `plan` returns.

    Attributes:
        waiting: queries without a row, in order of submission; `query.cached` > 0 for those with
            parked keys.
        running: queries with a row, in order of admission.
        num_slots: rows that there are.
        capacity: the most tokens of a row.
        bytes_in_use: of the cached keys and values of all rows.
        bytes_per_token: of one token's keys and values.
        now: clock seconds.
        kv_budget: the most bytes that `bytes_in_use` may ever be; None without a bound.
        whole_prompts: whether a prompt has to be computed in one forward: in an aligned cache no
            row can grow without the others, and dynamic RoPE goes by the length that the forward
            ends at.
        more_to_come: whether queries will be submitted yet, for which it may pay to wait.
        prefills_elsewhere: whether whole prompts of forwards without decoding are computed beside
            the loop while queries decode, so that nobody waits for them. A query stays `running`
            with its `prompt_left` meanwhile; planned again, it is not computed again.
    """

    waiting: Collection[Query]
    running: Collection[Query]
    num_slots: int
    capacity: int
    bytes_in_use: int
    bytes_per_token: int
    now: float
    kv_budget: int | None = None
    whole_prompts: bool = False
    more_to_come: bool = False
    prefills_elsewhere: bool = False

    @property
    def num_free(self) -> int:
        """Rows without a query."""
        return self.num_slots - len(self.running)


class Forward(NamedTuple):
    """One run of the model.

    Attributes:
        prefill: queries and how many tokens of their prompt are computed; all that is left of it
            if the view says `whole_prompts`.
        decode: whether every running query whose prompt is complete computes its next token.
        padded: whether every row computes as many tokens as the longest one, the rest of them
            padding; needs a policy that `pads`.
    """

    prefill: tuple[tuple[Query, int], ...] = ()
    decode: bool = False
    padded: bool = False


class Plan(NamedTuple):
    """One iteration.

    Attributes:
        park: running queries that leave their row and wait again, keys kept, nothing to be
            recomputed.
        admit: waiting queries that get a row, at most as many as are free once `park` is done.
        forwards: run one after the other. A query whose prompt is complete after one can decode in
            the next.
    """

    park: tuple[Query, ...] = ()
    admit: tuple[Query, ...] = ()
    forwards: tuple[Forward, ...] = ()


class Policy(ABC):
    """Decides what a relay does next. One object serves one relay, so it may keep state.

    A plan need not be carried out to the end: a callback can cancel a query, its prefill can fail,
    Ctrl-C can end an iteration, the budget of bytes can be used up by then. So a plan is made from
    the view alone: a running query that has `prompt_left` is to be prefilled. When nothing runs and
    something waits, a plan admits something, unless more is to come.

    Attributes:
        admission: the order in which queries enter; its last one is the first to be parked when the
            budget would be exceeded.
        pads: whether it plans padded forwards: the cache then has columns for the padding.
        splits_prompts: whether it cannot do without computing prompts in parts; such a policy is
            refused where they have to be computed whole.
    """

    name: str
    admission: Admission = FirstCome()
    pads: bool = False
    splits_prompts: bool = False

    @abstractmethod
    def plan(self, view: View) -> Plan:
        """The next iteration."""

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


def positive(policy: str, **values: int) -> None:
    """Raises ValueError unless all values are at least 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{policy}: {name} must be >= 1, got {value}")
