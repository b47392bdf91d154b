"""Prompts in, results out: JSONL or plain text lines to PromptRecords, result records to JSONL.

A line that cannot be used becomes a PromptRecord with an `error` that names the line; reading
never stops at it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

CONTENT_FIELDS = ("prompt", "messages", "token_ids")
STRICT_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass
class PromptRecord:
    """One query as it was written down: its content and sampling options, or what is wrong."""

    id: str | int
    line: int | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    unknown_fields: tuple[str, ...] = ()

    def encode(self, tokenizer: Any | None, *, chat: bool = True) -> list[int]:
        """Token ids of the query.

        Args:
            tokenizer: Hugging Face tokenizer; may be None when the record has token_ids.
            chat: wrap a plain prompt as a user's message where the tokenizer has a chat template.

        Raises:
            ValueError: the content cannot be turned into tokens.
        """
        if self.token_ids is not None:
            return self.token_ids
        if tokenizer is None:
            raise ValueError("the model folder has no tokenizer: give token_ids instead of text")
        template = getattr(tokenizer, "chat_template", None)
        try:
            if self.messages is not None and not template:
                raise ValueError("messages need a chat template, and this tokenizer has none")
            if self.messages is not None or (chat and template):
                messages = self.messages or [{"role": "user", "content": self.prompt}]
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
                # The template has already written the special tokens.
                return list(tokenizer(text, add_special_tokens=False)["input_ids"])
            return list(tokenizer(self.prompt)["input_ids"])
        except ValueError:
            raise
        # Templates and tokenizers raise what they like (jinja2 errors, TypeError for lone
        # surrogates); whatever it is concerns this query alone.
        except Exception as error:
            raise ValueError(
                f"the text cannot be tokenized ({type(error).__name__}: {error})"
            ) from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all("content" in m for m in value)
    )


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(_is_int(token) for token in value)


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(s, str) or _is_ids(s) for s in value)
    )


# Types only: ranges are checked in one place, by the relay, for every way in.
FIELDS = {
    "id": (lambda v: isinstance(v, str) or _is_int(v), "a string or an integer"),
    "prompt": (lambda v: isinstance(v, str), "a string"),
    "messages": (_is_messages, "a list of objects with role and content"),
    "token_ids": (_is_ids, "a list of integers"),
    "max_new_tokens": (_is_int, "an integer"),
    "priority": (_is_number, "a number"),
    "temperature": (_is_number, "a number"),
    "top_p": (_is_number, "a number"),
    "top_k": (_is_int, "an integer"),
    "seed": (_is_int, "an integer"),
    "stop": (_is_stop, "a string or a list of strings or of token id lists"),
}


def parse_object(data: Any, line: int | None, default_id: str | int) -> PromptRecord:
    """One decoded JSON value as a PromptRecord; `error` is set where it is not a query."""
    where = f"line {line}: " if line is not None else ""
    record = PromptRecord(id=default_id, line=line)
    if not isinstance(data, dict):
        record.error = f"{where}expected a JSON object, got {type(data).__name__}"
        return record
    # null means "not given", as in files written by other programs.
    data = {name: value for name, value in data.items() if value is not None}
    if "id" in data and FIELDS["id"][0](data["id"]):
        record.id = data["id"]
    for name, value in data.items():
        if name in FIELDS and not FIELDS[name][0](value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            record.error = f"{where}{name} must be {FIELDS[name][1]}, got {shown}"
            return record
    given = [name for name in CONTENT_FIELDS if name in data]
    if len(given) != 1:
        got = " and ".join(given) if given else "none of them"
        record.error = f"{where}expected exactly one of prompt, messages or token_ids, got {got}"
        return record
    setattr(record, given[0], data[given[0]])
    record.options = {
        name: data[name] for name in FIELDS if name in data and name not in (*CONTENT_FIELDS, "id")
    }
    stop = record.options.get("stop")
    if stop is not None:
        record.options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    record.unknown_fields = tuple(name for name in data if name not in FIELDS)
    return record


def read_prompts(lines: Iterable[bytes], *, plain_text: bool) -> list[PromptRecord]:
    """All queries of a file or pipe, blank lines left out; a query's default id is its line number.

    Args:
        lines: raw lines, with or without their ends.
        plain_text: take a line that does not begin with `{` as the prompt itself.
    """
    records = []
    for number, raw in enumerate(lines, start=1):
        try:
            # Editors on Windows put a byte order mark at the beginning of the file.
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            message = f"line {number}: not UTF-8 ({error.reason} at byte {error.start})"
            records.append(PromptRecord(id=number, line=number, error=message))
            continue
        if not text:
            continue
        if plain_text and not text.startswith("{"):
            records.append(PromptRecord(id=number, line=number, prompt=text))
            continue
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            message = f"line {number}: not valid JSON ({error.msg}, column {error.colno})"
            records.append(PromptRecord(id=number, line=number, error=message))
        # Absurd nesting or absurdly long integers are the line's fault, too.
        except (RecursionError, ValueError) as error:
            message = f"line {number}: not valid JSON ({error})"
            records.append(PromptRecord(id=number, line=number, error=message))
        else:
            records.append(parse_object(data, number, number))
    return records


def read_prompt_file(path: Path) -> list[PromptRecord]:
    """Queries of a file: JSONL by its suffix, otherwise lines of plain text or JSON objects."""
    with path.open("rb") as stream:
        return read_prompts(stream, plain_text=path.suffix.lower() not in STRICT_SUFFIXES)


def demo_prompts() -> list[PromptRecord]:
    """The 48 prompts that come with the package."""
    resource = resources.files("baton_engines.cli") / "prompts" / "demo.jsonl"
    return read_prompts(resource.read_bytes().splitlines(), plain_text=False)


class ResultWriter:
    """JSONL records in the order of the prompts, each written once those before it are there.

    The order of finishing depends on policy and machine; the file does not, so two runs can be
    compared with `diff`.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = 0

    def put(self, index: int, record: dict[str, Any]) -> None:
        """Takes the record of the prompt number `index` (from 0)."""
        self._waiting[index] = record
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Writes what is still held back, for a run that ends early."""
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))

    def _write(self, record: dict[str, Any]) -> None:
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # Lone surrogates exist in JSON strings but not in UTF-8.
            line = json.dumps(record).encode()
        self._stream.write(line + b"\n")
        self._stream.flush()
