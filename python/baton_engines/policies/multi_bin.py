"""Multi-bin batching: run to completion, with batches of queries of about the same length.

Queries are sorted by length into k bins of equal probability mass. Batches form within a bin, and
the batch that became full first runs first. A batch that is not full runs when no full batch waits
and no more queries are to come. It counts as full once several times `bins * batch_size` queries
have arrived after its first one, so that no query starves.
Source: Multi-Bin Batching (arXiv 2412.04504), section 3; the last rule is ours.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from ..query import Query
from .admission import Admission, Length, get_admission, max_new_tokens
from .base import Policy, fitting, pack_prefills, positive
from .plan import Forward, Plan, View

_MAX_SEEN = 1 << 14
# A bin's batch counts as full once this many times `bins * batch_size` queries have arrived after
# its first one.
_PATIENCE = 4


def prompt_length(query: Query) -> float:
    """The prompt's length in tokens, if nothing better predicts the answer's length."""
    return len(query.prompt)


_LENGTHS = {"max_new_tokens": max_new_tokens, "prompt": prompt_length}


class MultiBin(Policy):
    """Batches of queries with similar lengths; each runs until its last query ends.

    Args:
        bins: number of bins.
        length: the quantity that a query's service time grows with: "max_new_tokens" (the true
            length if no query stops early), "prompt", or a callable that predicts it from a query.
        batch_size: queries in a full batch; by default, and at most, the number of slots.
        edges: the `bins - 1` lengths between the bins; default: the quantiles of the lengths seen
            so far.
        max_prefill_tokens: the most prompt tokens that share a forward; bounds the memory of a
            prefill.
        admission: the order within a bin; one of `ADMISSIONS`, or an `Admission`.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "multi_bin"

    def __init__(
        self,
        bins: int = 4,
        length: str | Length = "max_new_tokens",
        *,
        batch_size: int | None = None,
        edges: Sequence[float] | None = None,
        max_prefill_tokens: int = 2048,
        admission: str | Admission = "fcfs",
    ):
        positive(self, bins=bins, max_prefill_tokens=max_prefill_tokens)
        if batch_size is not None:
            positive(self, batch_size=batch_size)
        if not callable(length) and length not in _LENGTHS:
            raise ValueError(
                f"MultiBin: length must be {', '.join(_LENGTHS)} or callable, got {length!r}"
            )
        if edges is not None and (len(edges) != bins - 1 or list(edges) != sorted(edges)):
            raise ValueError(
                f"MultiBin: edges must be {bins - 1} lengths in ascending order, got {edges}"
            )
        self.bins = bins
        self.length = length if callable(length) else _LENGTHS[length]
        self.batch_size = batch_size
        self.edges = edges
        self.max_prefill_tokens = max_prefill_tokens
        self.admission = get_admission(admission)
        self._seen: deque[float] = deque(maxlen=_MAX_SEEN)
        self._newest = -1

    def plan(self, view: View) -> Plan:
        """A new batch if nothing runs, then one decode step of all running queries."""
        newcomers: tuple[Query, ...] = ()
        if not view.running:
            batch = self._next_batch(view)
            newcomers = fitting(view, batch, len(batch), reserve_all=True)
        prefills = pack_prefills((*view.running, *newcomers), self.max_prefill_tokens)
        return Plan(admit=newcomers, forwards=(*prefills, Forward(decode=True)))

    def _next_batch(self, view: View) -> list[Query]:
        """The batch that became full first; if none can, the one of the query that waits
        longest."""
        size = min(self.batch_size or view.num_slots, view.num_slots)
        queues: list[list[Query]] = [[] for _ in range(self.bins)]
        edges = self._edges(view)
        for query in self.admission.order(view):
            queues[bisect_right(edges, self.length(query))].append(query)
        newest = max((query.id for query in view.waiting), default=0)
        limit = _PATIENCE * self.bins * size
        # A bin's first batch becomes full no later than its others; each is listed with the number
        # of the query that filled it.
        full = []
        for queue in queues:
            batch = queue[:size]
            late = min((query.id for query in batch), default=newest) + limit
            if len(batch) == size:
                full.append((min(late, max(query.id for query in batch)), batch))
            elif late <= newest:
                full.append((late, batch))
        if full:
            return min(full, key=lambda one: one[0])[1]
        if view.more_to_come:
            return []
        return min((queue for queue in queues if queue), key=lambda queue: queue[0].id, default=[])

    def _edges(self, view: View) -> Sequence[float]:
        if self.edges is not None:
            return self.edges
        for query in view.waiting:
            if query.id > self._newest:
                self._newest = query.id
                self._seen.append(self.length(query))
        ordered = sorted(self._seen)
        return [ordered[len(ordered) * i // self.bins] for i in range(1, self.bins)]
