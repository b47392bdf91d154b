"""The interface of an engine that can be audited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class TargetError(RuntimeError):
    """The engine gave no answer; the message says what happened instead."""


class UnsupportedError(Exception):
    """The engine does not support these requests; the message says why."""


@dataclass(frozen=True)
class Request:
    """A prompt, and when it is sent and cancelled.

    Attributes:
        prompt: text.
        max_tokens: the most tokens of the answer, which is greedy.
        after: sent when the request before this one in the same batch has received this many
            tokens. 0: both are sent at once.
        cancel_after: tokens after which the request is cancelled; None: never.
    """

    prompt: str
    max_tokens: int
    after: int = 0
    cancel_after: int | None = None


@dataclass(frozen=True)
class Answer:
    """An answer to a request.

    Attributes:
        tokens: ids, or texts if the engine only gives these.
        logprobs: natural logarithms of the tokens' probabilities; empty if the engine gives none.
    """

    tokens: tuple[int | str, ...]
    logprobs: tuple[float, ...]


class Target(Protocol):
    """An engine that answers several requests at the same time."""

    @property
    def name(self) -> str:
        """For the heading of a report."""
        ...

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers, in the order of the requests; those of cancelled ones may be cut anywhere.

        Raises:
            UnsupportedError: requests cannot arrive late or be cancelled here.
            TargetError: a request that was not cancelled got no answer.
        """
        ...


def refuse_comings_and_goings(requests: Sequence[Request], reason: str) -> None:
    """Rejects late and cancelled requests, for engines whose batches are fixed from start to end.

    Raises:
        UnsupportedError: a request arrives late or is cancelled.
    """
    if any(request.after or request.cancel_after is not None for request in requests):
        raise UnsupportedError(reason)
