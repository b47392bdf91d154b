"""Runs a list of prompts through a relay: submits them, follows the run, collects the results.

Nothing a single prompt holds stops the others: what cannot be read, tokenized or served becomes a
result with an error.
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
    """What became of the prompts: their results in the order of the prompts, and counts."""

    results: list[dict[str, Any] | None]
    queries: list[Any | None]
    failed: int = 0
    cancelled: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)


class StopRequest:
    """Makes the first Ctrl-C (or termination signal) a request that is read between two steps.

    A step is never torn apart, so what has been generated can be written down. The second signal
    acts as usual.
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
    seed: int | None = None,
) -> list[Any | None]:
    """Submits every record that has no error; a record that cannot be tokenized gets one.

    Args:
        relay: Relay.
        records: PromptRecords. `error` is written.
        tokenizer: Hugging Face tokenizer or None.
        defaults: options of Relay.submit for records that do not set their own.
        chat: see PromptRecord.encode.
        seed: record i (from 0) samples with seed + i unless it has a seed of its own, so equal
            prompts give different samples.

    Returns:
        One Query per record, None for a record with an error.
    """
    queries: list[Any | None] = []
    for index, record in enumerate(records):
        query = None
        if record.error is None:
            options = {**defaults, **record.options}
            if seed is not None:
                options.setdefault("seed", seed + index)
            try:
                token_ids = record.encode(tokenizer, chat=chat)
            except ValueError as error:
                where = f"line {record.line}: " if record.line is not None else ""
                record.error = f"{where}{error}"
            else:
                query = relay.submit(token_ids, name=str(record.id), **options)
        queries.append(query)
    return queries


def result_of(
    record: PromptRecord, query: Any | None, *, token_ids: bool = False
) -> dict[str, Any]:
    """The result of one ended query, ready for JSON.

    Args:
        token_ids: add the generated token ids (always there when the relay has no tokenizer).
    """
    error = record.error
    if query is not None and query.error is not None:
        error = str(query.error) or type(query.error).__name__
    if error is not None:
        line = {} if record.line is None else {"line": record.line}
        return {"id": record.id, **line, "error": error}
    result = {
        "id": record.id,
        "text": query.text,
        "finish_reason": query.finish_reason,
        "prompt_tokens": len(query.prompt),
        "output_tokens": len(query.tokens),
    }
    if token_ids or query.text is None:
        result["token_ids"] = list(query.tokens)
    return result


def run_records(
    relay: Any,
    records: Sequence[PromptRecord],
    queries: Sequence[Any | None],
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
    outcome = Outcome(results=[None] * len(records), queries=list(queries))

    def finish(index: int) -> None:
        query = queries[index]
        result = result_of(records[index], query, token_ids=token_ids)
        outcome.results[index] = result
        if "error" in result:
            outcome.failed += 1
            # A line number says as well which query it is.
            named = result["error"].startswith("line ")
            outcome.errors.append(
                result["error"] if named else f"query {result['id']}: {result['error']}"
            )
        elif query.status == "cancelled":
            outcome.cancelled += 1
        on_result(index, result)

    def collect(open_indices: list[int]) -> list[int]:
        still_open = []
        for index in open_indices:
            if queries[index] is None or queries[index].ended:
                finish(index)
            else:
                still_open.append(index)
        return still_open

    begin = time.perf_counter()
    open_indices = collect(list(range(len(records))))
    more = True
    while more and not stop:
        more = relay.step()
        open_indices = collect(open_indices)
        elapsed = time.perf_counter() - begin
        on_step(
            [queries[index] for index in open_indices],
            len(records) - len(open_indices),
            relay.counters.output_tokens / elapsed,
        )
    if stop:
        for index in open_indices:
            relay.cancel(queries[index])
    open_indices = collect(open_indices)
    # A relay that reports nothing to do while a query is open would lose it without a word.
    if open_indices:
        raise RuntimeError(f"run: {len(open_indices)} queries have not ended, the relay is idle")
    outcome.seconds = time.perf_counter() - begin
    return outcome
