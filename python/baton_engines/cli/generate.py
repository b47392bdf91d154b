"""Runs a list of prompts through a relay: submits them, follows the run, collects the results.

No single prompt stops the others: if it cannot be read, tokenized or answered, its result holds an
error.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .prompts_io import PromptRecord


@dataclass
class Outcome:
    """The results in the order of the prompts, and counts.

    A result is empty until its queries have ended.
    """

    results: list[dict[str, Any]]
    failed: int = 0
    cancelled: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


class StopRequest:
    """Turns the first Ctrl-C (or termination signal) into a flag that is read between two steps.

    A step is never interrupted, so everything generated so far can be written. The second signal
    has its usual effect.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _handle(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())


def submit_records(
    relay: Any,
    records: Sequence[PromptRecord],
    tokenizer: Any | None,
    *,
    defaults: Mapping[str, Any],
    chat: bool = True,
) -> list[tuple[Any, ...]]:
    """Submits every record that has no error; a record that cannot be tokenized gets one.

    Args:
        relay: Relay.
        records: PromptRecords. `error` is written.
        tokenizer: Hugging Face tokenizer or None.
        defaults: options of Relay.submit, and n, for records that do not set their own.
        chat: see PromptRecord.encode.

    Returns:
        The queries of every record: one for each of its n answers, none if it has an error.
    """
    queries: list[tuple[Any, ...]] = []
    for record in records:
        own: tuple[Any, ...] = ()
        if record.error is None:
            options = {**defaults, **record.options}
            count = options.pop("n", None)
            try:
                token_ids = record.encode(tokenizer, chat=chat)
                own = tuple(
                    relay.submit_n(
                        token_ids, 1 if count is None else count, name=str(record.id), **options
                    )
                )
            except ValueError as error:
                where = f"line {record.line}: " if record.line is not None else ""
                record.error = f"{where}{error}"
        queries.append(own)
    return queries


def result_of(
    record: PromptRecord, queries: Sequence[Any], *, token_ids: bool = False
) -> dict[str, Any]:
    """The result of one record whose queries have ended, ready for JSON.

    Args:
        token_ids: add the generated token ids (always there when the relay has no tokenizer).
    """
    errors = [query.error for query in queries if query.error is not None]
    error = record.error
    if errors:
        error = str(errors[0]) or type(errors[0]).__name__
    if error is not None:
        line = {} if record.line is None else {"line": record.line}
        return {"id": record.id, **line, "error": error}
    answers = [_answer_of(query, token_ids) for query in queries]
    prompt_tokens = {"prompt_tokens": len(queries[0].prompt)}
    if len(answers) == 1:
        # The order that is easiest to read.
        text_and_reason = {name: answers[0].pop(name) for name in ("text", "finish_reason")}
        return {"id": record.id, **text_and_reason, **prompt_tokens, **answers[0]}
    return {"id": record.id, **prompt_tokens, "answers": answers}


def _answer_of(query: Any, token_ids: bool) -> dict[str, Any]:
    answer = {
        "text": query.text,
        "finish_reason": query.finish_reason,
        "output_tokens": len(query.tokens),
    }
    if token_ids or query.text is None:
        answer["token_ids"] = list(query.tokens)
    if query.logprobs is not None:
        answer["logprobs"] = [
            {"token_id": entry.token, "logprob": entry.logprob, "top": entry.top}
            for entry in query.logprobs
        ]
    return answer


def was_cancelled(result: Mapping[str, Any]) -> bool:
    """Whether an answer of the result was cut off by a cancellation."""
    answers = result.get("answers", [result])
    return any(answer.get("finish_reason") == "cancelled" for answer in answers)


def run_records(
    relay: Any,
    records: Sequence[PromptRecord],
    queries: Sequence[Sequence[Any]],
    *,
    on_result: Callable[[int, dict[str, Any]], object] = lambda index, result: None,
    on_step: Callable[[Sequence[Any], int, float], object] = lambda running, done, rate: None,
    stop: Any = False,
    token_ids: bool = False,
) -> Outcome:
    """Steps the relay until nothing is left to do, or cancels the rest when `stop` becomes true.

    Args:
        relay: Relay that `queries` were submitted to.
        records, queries: as given to and returned by submit_records.
        on_result: called with (index, result) as soon as a query has ended.
        on_step: called after every step with (queries not ended, ended count, output tokens/s).
        stop: anything with a truth value, read between two steps.
        token_ids: see result_of.
    """
    run = RecordRun(relay, records, queries, on_result=on_result, token_ids=token_ids)
    begin = time.perf_counter()
    while run.open_queries and not stop:
        run.step()
        on_step(
            run.open_queries,
            run.num_ended,
            relay.counters.output_tokens / (time.perf_counter() - begin),
        )
    if stop:
        run.cancel()
    run.outcome.seconds = time.perf_counter() - begin
    return run.outcome


class RecordRun:
    """A run that the caller steps.

    Args:
        relay, records, queries, on_result, token_ids: see `run_records`.

    Attributes:
        outcome: the results of the records so far.
        num_ended: records whose queries have all ended.
    """

    def __init__(
        self,
        relay: Any,
        records: Sequence[PromptRecord],
        queries: Sequence[Sequence[Any]],
        *,
        on_result: Callable[[int, dict[str, Any]], object] = lambda index, result: None,
        token_ids: bool = False,
    ) -> None:
        self.outcome = Outcome(results=[{} for _ in records])
        self.num_ended = 0
        self._relay = relay
        self._records = records
        self._queries = queries
        self._on_result = on_result
        self._token_ids = token_ids
        self._open = list(range(len(records)))
        self._collect()

    @property
    def open_queries(self) -> list[Any]:
        """The queries of the records that have not ended."""
        return [query for index in self._open for query in self._queries[index]]

    def step(self) -> None:
        """One step of the relay.

        Raises:
            RuntimeError: the relay has nothing to do, while queries are open.
        """
        more = self._relay.step()
        self._collect()
        # Otherwise such a query would be lost silently.
        if self._open and not more:
            raise RuntimeError(f"run: {len(self._open)} queries have not ended, the relay is idle")

    def cancel(self) -> None:
        """Cancel the queries that have not ended."""
        for query in self.open_queries:
            self._relay.cancel(query)
        self._collect()

    def _collect(self) -> None:
        still_open = []
        for index in self._open:
            if all(query.ended for query in self._queries[index]):
                self._finish(index)
            else:
                still_open.append(index)
        self._open = still_open

    def _finish(self, index: int) -> None:
        self.num_ended += 1
        outcome = self.outcome
        result = result_of(self._records[index], self._queries[index], token_ids=self._token_ids)
        outcome.results[index] = result
        if "error" in result:
            outcome.failed += 1
            # A line number already says which query it is.
            named = result["error"].startswith("line ")
            outcome.errors.append(
                result["error"] if named else f"query {result['id']}: {result['error']}"
            )
        elif was_cancelled(result):
            outcome.cancelled += 1
        self._on_result(index, result)
