"""A relay in this process as a target; it supports all kinds of company."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..query import Query
from ..relay import Relay
from .target import Answer, Request, TargetError


class RelayTarget:
    """A relay.

    Args:
        relay: one that is not used elsewhere meanwhile.
        encode: from a prompt to token ids.
        name: for the heading of a report.
    """

    def __init__(self, relay: Relay, encode: Callable[[str], list[int]], name: str = "relay"):
        self.relay = relay
        self.name = name
        self._encode = encode

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Target.ask`."""
        queries: list[Query] = []
        while True:
            self._submit_due(requests, queries)
            for request, query in zip(requests, queries, strict=False):
                limit = request.cancel_after
                if limit is not None and len(query.tokens) >= limit and not query.ended:
                    self.relay.cancel(query)
            if len(queries) == len(requests) and all(query.ended for query in queries):
                return [_answer(query, self.name) for query in queries]
            self.relay.step()

    def _submit_due(self, requests: Sequence[Request], queries: list[Query]) -> None:
        for request in requests[len(queries) :]:
            before = queries[-1] if queries else None
            if before is not None and not (before.ended or len(before.tokens) >= request.after):
                return
            queries.append(
                self.relay.submit(
                    self._encode(request.prompt),
                    max_new_tokens=request.max_tokens,
                    temperature=0.0,
                    logprobs=0,
                )
            )


def _answer(query: Query, name: str) -> Answer:
    if query.status == "failed":
        raise TargetError(f"{name}: {query.error}")
    return Answer(tuple(query.tokens), tuple(entry.logprob for entry in query.logprobs or ()))
