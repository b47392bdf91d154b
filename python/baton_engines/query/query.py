"""One request to the relay: its prompt, its tokens, and its outcome.

A query is "waiting" until a policy admits it, "running" while it has a row of the batch, "parked"
after `Relay.preempt`, and ends as "finished", "cancelled" or "failed". Only the engine changes a
query; everybody else only reads it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from .text import decode_text, unfinished

if TYPE_CHECKING:
    # Not imported at run time, so this is fast: the command line imports this package first.
    import torch

    from .serving import Serving


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalties and temperature.

    Attributes:
        token: the generated token id.
        logprob: the logarithm of its probability.
        top: ids and logarithms of the likeliest tokens, in order; `submit` sets their number.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


ENDED = ("finished", "cancelled", "failed")


class Query:
    """One request; made by `Relay.submit`.

    Attributes:
        id: number in order of submission, starting at 0 for each relay.
        name: the object that was passed to `submit`, or None.
        prompt: the prompt's token ids.
        max_new_tokens: the largest number of tokens to generate.
        priority: used by the admission `priority`; higher values enter first.
        tokens: the token ids generated so far, including the end-of-sequence token and stop
            sequences.
        status: "waiting", "running", "parked", "finished", "cancelled" or "failed".
        finish_reason: "eos", "length", "stop", "cancelled" or "error"; None before the end.
        error: the exception of a failed query, else None.
        submitted, first_token, finished: clock seconds; None until they happen.
        token_times: clock seconds of every generated token.
        slot: the row of the cache that holds the query; None without one.
        cached: how many tokens have keys and values, in the slot, parked or in the prefix cache.
        logprobs: of every generated token if `submit` requested them, else None.
        tokenizer: decodes `text`; None where the relay has none.
        parked_kv: for the engine: keys and values in host memory, while the query has no slot.
        shared_prompt: for the engine: SharedPrompt of queries that were submitted together, else
            None.
    """

    def __init__(self, id: int, submitted: float, *, name: object = None, tokenizer=None):
        self.id = id
        self.name = name
        self.prompt: list[int] = []
        self.max_new_tokens = 0
        self.priority = 0.0
        self.tokens: list[int] = []
        self.status = "waiting"
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.submitted = submitted
        self.first_token: float | None = None
        self.finished: float | None = None
        self.token_times = array("d")
        self.slot: int | None = None
        self.cached = 0
        self.logprobs: list[TokenLogprobs] | None = None
        self.tokenizer = tokenizer
        self.parked_kv: tuple[torch.Tensor, torch.Tensor] | None = None
        self.shared_prompt: SharedPrompt | None = None
        self._serving: Serving | None = None
        self._final_text: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the query has finished, failed or been cancelled."""
        return self.status in ENDED

    @property
    def prompt_left(self) -> int:
        """Prompt tokens whose keys and values have not been computed yet."""
        return max(0, len(self.prompt) - self.cached)

    @property
    def max_cached(self) -> int:
        """The most tokens that will ever have keys and values: the last token needs none."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def text(self) -> str | None:
        """The generated text, without what stopped it; None when the relay has no tokenizer.

        Before the end it holds complete characters only.
        """
        if self._final_text is not None or self.tokenizer is None:
            return self._final_text
        text = decode_text(self.tokenizer, self.tokens)
        return text if self.ended else text[: len(text) - unfinished(text)]

    def result(self) -> list[int]:
        """The generated tokens of a query that has ended; a cancelled query keeps those it had.

        Raises:
            RuntimeError: the query has not ended; `Relay.run` and `Relay.stream` run it to its end.
            Exception: the query's own `error` if it failed.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if not self.ended:
            raise RuntimeError(
                f"Query.result: query {self.id} must have ended, got status {self.status!r}"
            )
        return self.tokens

    @property
    def serving(self) -> Serving:
        """For the engine: everything it needs for running the query, from `serve` to `end`."""
        if self._serving is None:
            raise RuntimeError(
                f"Query.serving: query {self.id} must be served, got status {self.status!r}"
            )
        return self._serving

    def serve(self, serving: Serving) -> None:
        """For the engine: the query can run."""
        self._serving = serving

    def end(
        self, status: str, reason: str, finished: float, error: Exception | None = None
    ) -> None:
        """For the engine: the query has ended; it keeps only tokens and times.

        The arguments become `status`, `finish_reason`, `finished` and `error`.
        """
        self.status, self.finish_reason, self.error = status, reason, error
        self.finished = finished
        if self._serving is not None:
            self._final_text = self._serving.stopper.text
        self._serving = self.shared_prompt = None

    def is_held_back(self) -> bool:
        """For the engine: whether this query waits for a prompt that another query computes."""
        return self.shared_prompt is not None and self.shared_prompt.holds_back(self)

    def pending_tokens(self, count: int) -> list[int]:
        """The next `count` ids, of the prompt or of `tokens`, whose keys are not cached yet."""
        if self.cached < len(self.prompt):
            return self.prompt[self.cached : self.cached + count]
        first = self.cached - len(self.prompt)
        return self.tokens[first : first + count]

    def __repr__(self) -> str:
        label = "" if self.name is None else f" {self.name!r}"
        tokens = f"{len(self.prompt)} prompt + {len(self.tokens)} tokens"
        return f"<Query {self.id}{label} {self.status}, {tokens}>"


class SharedPrompt:
    """A prompt that several queries share: one computes it, the others copy its row.

    The others take their first tokens from the leader's logits and later copy its row. Nothing is
    computed twice, and every query gets the bits that it would get by itself.

    Args:
        queries: at least two, with the same prompt.

    Attributes:
        leader: the query that computes the prompt, or has computed it.
        pending: the queries that have no keys and values yet, by id.
        ready: whether the prompt has been computed.
        parked: keys and values of the prompt in host memory, once the leader has lost its row.
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
        """Whether the query should wait, because another query is computing its prompt."""
        if self.ready or query is self.leader:
            return False
        if self.leader.status in ("waiting", "running"):
            return True
        # The leader has ended or was parked before it computed anything.
        self.leader = query
        self.pending.pop(query.id, None)
        return False

    def offer(self) -> list[Query]:
        """The leader's row now holds the whole prompt; returns the queries that may get a token."""
        self.ready = True
        for query in self.pending.values():
            # The last prompt token counts once the token that follows it is delivered.
            query.cached = len(query.prompt) - 1
        return list(self.pending.values())


def wait_in_order(waiting: dict[int, Query], query: Query) -> None:
    """Puts a query among those that wait, in order of submission; it must not be anywhere else."""
    query.status = "waiting"
    in_order = not waiting or next(reversed(waiting)) < query.id
    waiting[query.id] = query
    if not in_order:
        ordered = sorted(waiting.items())
        waiting.clear()
        waiting.update(ordered)
