"""What a policy sees and what it says: the one interface between the relay and its scheduling.

Once per iteration the relay asks `Policy.plan` which queries give up their row, which waiting ones
enter, and which forwards compute what. The relay does as it is told and knows no policy by name:
prefill apart or in one forward with the decoders, whole prompts or chunks, first come first served
or any other order, within a budget of bytes or not, are all plans.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from ..query import Query


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
    """

    waiting: Collection[Query]
    running: Collection[Query]
    num_slots: int
    capacity: int
    bytes_in_use: int
    bytes_per_token: int
    now: float

    @property
    def num_free(self) -> int:
        """Rows without a query."""
        return self.num_slots - len(self.running)


class Forward(NamedTuple):
    """One run of the model.

    Attributes:
        prefill: queries and how many tokens of their prompt are computed; less than all that is
            left needs a ragged cache, where a row can grow without the others.
        decode: whether every running query whose prompt is complete computes its next token.
    """

    prefill: tuple[tuple[Query, int], ...] = ()
    decode: bool = False


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
    Ctrl-C can end an iteration. So a plan is made from the view alone: a running query that has
    `prompt_left` is to be prefilled. When nothing runs and something waits, a plan admits
    something.
    """

    name: str

    @abstractmethod
    def plan(self, view: View) -> Plan:
        """The next iteration."""


def pack_prefills(queries: Iterable[Query], max_tokens: int) -> tuple[Forward, ...]:
    """Forwards that prefill whole prompts, each of at most `max_tokens` tokens or of one query."""
    forwards: list[Forward] = []
    room = 0
    for query in queries:
        if not query.prompt_left:
            continue
        if not forwards or query.prompt_left > room:
            forwards.append(Forward())
            room = max_tokens
        forwards[-1] = Forward((*forwards[-1].prefill, (query, query.prompt_left)))
        room -= query.prompt_left
    return tuple(forwards)
