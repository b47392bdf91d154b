"""A prompt that several queries have in common: one computes it, the others copy its row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .query import Query


class SharedPrompt:
    """Who computes the prompt, and who still waits to copy it.

    The others take their first tokens from the leader's logits, and later copy its row: nothing is
    computed twice, so they have the bits that they would have alone.

    Args:
        queries: at least two, with the same prompt.

    Attributes:
        leader: the query that computes the prompt, or has done so.
        pending: the queries without keys and values of their own, by id.
        ready: whether the prompt has been computed.
        parked: keys and values of the prompt in host memory, once the leader's row is gone.
        lost: why they could not be kept, or None.
    """

    def __init__(self, queries: Sequence[Query]) -> None:
        self.leader = queries[0]
        self.pending = {query.id: query for query in queries[1:]}
        self.ready = False
        self.parked: tuple[torch.Tensor, torch.Tensor] | None = None
        self.lost: Exception | None = None
        for query in queries:
            query.shared_prompt = self
            query.prompt = queries[0].prompt

    def holds_back(self, query: Query) -> bool:
        """Whether the query had better wait, as its prompt is being computed by another one."""
        if self.ready or query is self.leader:
            return False
        if self.leader.status in ("waiting", "running"):
            return True
        # The leader is gone or was put aside before it had computed anything.
        self.leader = query
        self.pending.pop(query.id, None)
        return False

    def offer(self) -> list[Query]:
        """The leader's row holds the whole prompt now; the queries that may have a token."""
        self.ready = True
        for query in self.pending.values():
            # The last one counts with the token that follows from it.
            query.cached = len(query.prompt) - 1
        return list(self.pending.values())


def is_held_back(query: Query) -> bool:
    """Whether another query computes the prompt that the query waits for."""
    return query.shared_prompt is not None and query.shared_prompt.holds_back(query)
