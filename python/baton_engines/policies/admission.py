"""The order in which waiting queries enter: an object that every policy takes.

A query's rank is `cost x overtakes + number in order of submission`; the lowest rank enters first.
So the number of later queries that may overtake a query is bounded by how much more it costs than
they do, and no query starves:

    q is overtaken only by queries submitted less than `(cost(q) - lowest cost) x overtakes` after q

First come first served is the order in which all queries cost the same.
"""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator

from ..query import Query
from .plan import View

Length = Callable[[Query], float]


def max_new_tokens(query: Query) -> float:
    """The default prediction of the answer's length: the most tokens that are allowed."""
    return query.max_new_tokens


class Admission(ABC):
    """An order of queries.

    Args:
        overtakes: how many later submissions outweigh one unit of cost.
    """

    name: str

    def __init__(self, overtakes: float):
        if not 0 <= overtakes < float("inf"):
            raise ValueError(
                f"{type(self).__name__}: overtakes must be finite and >= 0, got {overtakes}"
            )
        self.overtakes = overtakes

    @abstractmethod
    def cost(self, query: Query, reference: float) -> float:
        """A query with a higher cost enters later.

        Args:
            query: waiting or running.
            reference: see `reference`.
        """

    def reference(self, running: Iterable[Query], waiting: Iterable[Query]) -> float:
        """The value that costs in this iteration are relative to; 0 if they are absolute."""
        return 0.0

    def order(self, view: View) -> Iterator[Query]:
        """The waiting queries in order of admission."""
        reference = self.reference(view.running, view.waiting)
        heap = [(*self._rank(query, reference), query) for query in view.waiting]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[-1]

    def last(self, queries: Collection[Query]) -> Query:
        """The query that comes after all others."""
        reference = self.reference(queries, queries)
        return max(queries, key=lambda query: self._rank(query, reference))

    def _rank(self, query: Query, reference: float) -> tuple[float, int]:
        # The id is added again as a tie-breaker: no two queries have the same rank.
        return self.overtakes * self.cost(query, reference) + query.id, query.id


class FirstCome(Admission):
    """In order of submission."""

    name = "fcfs"

    def __init__(self):
        super().__init__(0.0)

    def cost(self, query: Query, reference: float) -> float:
        """The same for all queries."""
        return 0.0

    def order(self, view: View) -> Iterator[Query]:
        """The waiting queries in order of submission."""
        return iter(view.waiting)


class ShortestFirst(Admission):
    """The shortest answer first.

    Args:
        length: predicts how many tokens a query will generate; default its `max_new_tokens`.
        overtakes: how many later submissions outweigh one token.
    """

    name = "shortest"

    def __init__(self, length: Length = max_new_tokens, overtakes: float = 1.0):
        super().__init__(overtakes)
        self.length = length

    def cost(self, query: Query, reference: float) -> float:
        """The answer's length in tokens."""
        return self.length(query)


class LengthAware(Admission):
    """Queries whose row will be about as long as the longest running one enter first.

    In an aligned cache one long row makes all others carry padding, and in a batch that runs to
    completion all wait for the longest. In a ragged cache this order gains nothing.

    Args:
        length: predicts how many tokens a query will generate; default its `max_new_tokens`.
        overtakes: how many later submissions outweigh one token of difference.
    """

    name = "length_aware"

    def __init__(self, length: Length = max_new_tokens, overtakes: float = 1.0):
        super().__init__(overtakes)
        self.length = length

    def reference(self, running: Iterable[Query], waiting: Iterable[Query]) -> float:
        """The longest running row; if none runs, the row of the query that has waited longest."""
        first = next(iter(waiting), None)
        alone = 0.0 if first is None else self._row_length(first)
        return max(map(self._row_length, running), default=alone)

    def cost(self, query: Query, reference: float) -> float:
        """The difference in tokens."""
        return abs(self._row_length(query) - reference)

    def _row_length(self, query: Query) -> float:
        return len(query.prompt) + self.length(query)


class Priority(Admission):
    """The highest `Query.priority` first; waiting queries age, so that none starves.

    Args:
        overtakes: how many later submissions outweigh one level of priority.
    """

    name = "priority"

    def __init__(self, overtakes: float = 16.0):
        super().__init__(overtakes)

    def cost(self, query: Query, reference: float) -> float:
        """Lower for a higher priority."""
        return -query.priority


_ADMISSIONS = {order.name: order for order in (FirstCome, ShortestFirst, LengthAware, Priority)}
ADMISSIONS = tuple(_ADMISSIONS)


def get_admission(name: str | Admission) -> Admission:
    """The order with that name; an object that is already an order is returned as it is.

    Raises:
        ValueError: no order has that name.
    """
    if isinstance(name, Admission):
        return name
    if name not in _ADMISSIONS:
        raise ValueError(
            f"policies.get_admission: name must be one of {', '.join(ADMISSIONS)}, got {name!r}"
        )
    return _ADMISSIONS[name]()
