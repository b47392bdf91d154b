"""One request on its way through the relay: its prompt, its tokens, and what became of it.

A query is "waiting" until a policy admits it, "running" while it has a row of the batch, "parked"
after `Relay.preempt`, and ends as "finished", "cancelled" or "failed". Only the relay changes a
query; everybody else reads it.
"""

from array import array
from collections.abc import Callable
from typing import NamedTuple


class TokenLogprobs(NamedTuple):
    """Natural logarithms of the model's own probabilities, before penalties and temperature.

    Attributes:
        token: the generated token id.
        logprob: its logarithm.
        top: ids and logarithms of the likeliest tokens, as many as `submit` requested, in order.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


ENDED = ("finished", "cancelled", "failed")


class Query:
    """One request; made by `Relay.submit`.

    Attributes:
        id: number in order of submission, starting at 0 for each relay.
        name: whatever was given to `submit`, or None.
        prompt: the prompt's token ids.
        max_new_tokens: the most tokens that are generated.
        priority: what the admission `priority` goes by, more before less.
        tokens: the generated token ids so far, the end-of-sequence token and stop sequences
            included.
        status: "waiting", "running", "parked", "finished", "cancelled" or "failed".
        finish_reason: "eos", "length", "stop", "cancelled" or "error"; None before the end.
        error: the exception of a failed query, else None.
        submitted, first_token, finished: clock seconds; None while they have not happened.
        token_times: clock seconds of every generated token.
        slot: the row of the cache that holds the query, None outside of one.
        cached: how many tokens have keys and values, in the slot or parked.
        shared_prompt: SharedPrompt of queries that were submitted together, else None.
        logprobs: of every generated token, if `submit` requested them, else None.
    """

    def __init__(
        self,
        id: int,
        submitted: float,
        *,
        name: object = None,
        on_token: Callable[["Query", int], object] | None = None,
        on_text: Callable[["Query", str], object] | None = None,
        tokenizer=None,
    ):
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
        # What the relay needs while the query lives; dropped at its end, so that an ended query is
        # tokens and times only.
        self.shared_prompt = None
        self._on_token = on_token
        self._on_text = on_text
        self._pieces = None
        self._sampler = None
        self._stopper = None
        self._parked_kv = None
        self._tokenizer = tokenizer
        self._final_text: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the query has finished, failed or been cancelled."""
        return self.status in ENDED

    @property
    def prompt_left(self) -> int:
        """Prompt tokens whose keys and values are still to be computed."""
        return max(0, len(self.prompt) - self.cached)

    @property
    def max_cached(self) -> int:
        """The most tokens that will ever have keys and values: the last one needs none."""
        return len(self.prompt) + self.max_new_tokens - 1

    @property
    def text(self) -> str | None:
        """The generated text, cut before what stopped it; None when the relay has no tokenizer.

        Before the end it holds complete characters only.
        """
        if self._final_text is not None or self._tokenizer is None:
            return self._final_text
        text = decode_text(self._tokenizer, self.tokens)
        return text if self.ended else text[: len(text) - unfinished(text)]

    def result(self) -> list[int]:
        """The generated tokens of a query that has ended, those before the end if it was cancelled.

        Raises:
            RuntimeError: the query has not ended; `Relay.run` or `Relay.stream` take it there.
            Exception: the query's own `error` when it failed.
        """
        if self.error is not None:
            raise self.error.with_traceback(None)
        if not self.ended:
            raise RuntimeError(
                f"Query.result: query {self.id} must have ended, got status {self.status!r}"
            )
        return self.tokens

    def pending_tokens(self, count: int) -> list[int]:
        """The next `count` ids, of the prompt or of `tokens`, whose keys are not cached."""
        if self.cached < len(self.prompt):
            return self.prompt[self.cached : self.cached + count]
        first = self.cached - len(self.prompt)
        return self.tokens[first : first + count]

    def __repr__(self) -> str:
        label = "" if self.name is None else f" {self.name!r}"
        tokens = f"{len(self.prompt)} prompt + {len(self.tokens)} tokens"
        return f"<Query {self.id}{label} {self.status}, {tokens}>"


def wait_in_order(waiting: dict[int, Query], query: Query) -> None:
    """Put a query that is nowhere among those that wait, in its order of submission."""
    query.status = "waiting"
    in_order = not waiting or next(reversed(waiting)) < query.id
    waiting[query.id] = query
    if not in_order:
        ordered = sorted(waiting.items())
        waiting.clear()
        waiting.update(ordered)


def decode_text(tokenizer, tokens: list[int], *, skip_special_tokens: bool = True) -> str:
    """The text of `tokens`: the one way in which a tokenizer is called."""
    # Cleaning up spaces would let a later token change earlier text, and text cut at a stop string
    # could not be trusted.
    return tokenizer.decode(
        tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )


# Replacement characters at the end are held back, as the next token may complete what they stand
# for. Tokenizers with byte fallback show a character or two as one of them per byte; beyond that
# they are no unfinished text but noise, which must not be decoded over and over again.
_MAX_UNFINISHED = 16


def unfinished(text: str) -> int:
    """How many characters at the end of decoded text may be the beginning of another one."""
    count = len(text) - len(text.rstrip("\ufffd"))
    return 0 if count > _MAX_UNFINISHED else count
