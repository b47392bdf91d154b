"""Reads prompts: lines of JSONL or plain text become PromptRecords.

A line that cannot be used becomes a PromptRecord with an `error` that names the line; reading
goes on after it.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from ..query.chat import ContentError, encode_messages
from ..query.errors import is_failure

CONTENT_FIELDS = ("prompt", "messages", "token_ids")
_NO_OPTIONS = (*CONTENT_FIELDS, "id", "continue_final_message")
STRICT_SUFFIXES = (".jsonl", ".ndjson", ".json")


class EncodingError(ValueError):
    """Prompts are not encoded in UTF-8; the message names the encoding."""


@dataclass
class PromptRecord:
    """One query as the user wrote it: its content and sampling options, or the error in it.

    `continue_final_message`: whether the answer continues the last message; None: only if that is
    the assistant's.
    """

    id: str | int
    line: int | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    token_ids: list[int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    continue_final_message: bool | None = None
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
        if self.messages is not None and not template:
            raise ValueError("messages need a chat template, and this tokenizer has none")
        try:
            if self.messages is not None or (chat and template):
                messages = self.messages or [{"role": "user", "content": self.prompt}]
                return encode_messages(tokenizer, messages, continued=self.continue_final_message)
            return list(tokenizer(self.prompt)["input_ids"])
        # The message already names the part of the record.
        except ContentError:
            raise
        # Templates and tokenizers raise all kinds of exceptions (jinja2 errors, TypeError for lone
        # surrogates, panics); any of them concerns this query only.
        except BaseException as error:
            if not is_failure(error):
                raise
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


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isdecimal() and _is_number(bias) for key, bias in value.items()
    )


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and all(isinstance(s, str) or _is_ids(s) for s in value)
    )


# Checks types only: the relay checks ranges, in one place for every source of prompts.
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
    "min_p": (_is_number, "a number"),
    "repetition_penalty": (_is_number, "a number"),
    "frequency_penalty": (_is_number, "a number"),
    "presence_penalty": (_is_number, "a number"),
    "logit_bias": (_is_bias, "an object of token ids and numbers"),
    "suppress_tokens": (_is_ids, "a list of integers"),
    "min_new_tokens": (_is_int, "an integer"),
    "logprobs": (_is_int, "an integer"),
    "n": (_is_int, "an integer"),
    "seed": (_is_int, "an integer"),
    "stop": (_is_stop, "a string or a list of strings or of token id lists"),
    "continue_final_message": (lambda v: isinstance(v, bool), "true or false"),
}
# Fields of other programs that would change the answer, and what to write instead. Ignoring them
# silently would answer another question.
REFUSED = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "num_return_sequences": "n",
    "top_logprobs": "logprobs",
    "stop_sequences": "stop",
    "stop_token_ids": "stop",
    "do_sample": "temperature",
    "bad_words_ids": "suppress_tokens",
    **dict.fromkeys(
        (
            *("tools", "tool_choice", "functions", "function_call"),
            *("images", "image", "image_url", "audio", "videos", "multi_modal_data", "modalities"),
            *("response_format", "structured_outputs", "guided_json", "guided_regex"),
            *("guided_choice", "guided_grammar", "grammar", "json_schema"),
            *("num_beams", "use_beam_search", "beam_width", "best_of", "length_penalty"),
            *("early_stopping", "no_repeat_ngram_size", "typical_p", "epsilon_cutoff"),
            *("eta_cutoff", "top_h", "top_a", "tfs", "mirostat", "penalty_alpha"),
            *("guidance_scale", "bad_words", "ignore_eos", "prompt_logprobs", "echo", "suffix"),
        )
    ),
}


def parse_object(data: Any, line: int | None, default_id: str | int) -> PromptRecord:
    """One decoded JSON value as a PromptRecord; `error` is set where it is not a query."""
    where = f"line {line}: " if line is not None else ""
    record = PromptRecord(id=default_id, line=line)
    if not isinstance(data, dict):
        record.error = f"{where}expected a JSON object, got {type(data).__name__}"
        return record
    # null means "not given", as in files that other programs write.
    data = {name: value for name, value in data.items() if value is not None}
    if "id" in data and FIELDS["id"][0](data["id"]):
        record.id = data["id"]
    for name, value in data.items():
        if name in FIELDS and not FIELDS[name][0](value):
            shown = json.dumps(value)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            record.error = f"{where}{name} must be {FIELDS[name][1]}, got {shown}"
            return record
    for name, instead in REFUSED.items():
        if data.get(name):
            hint = f": use {instead}" if instead else ""
            record.error = f"{where}{name} is not supported{hint}"
            return record
    given = [name for name in CONTENT_FIELDS if name in data]
    if len(given) != 1:
        got = " and ".join(given) if given else "none of them"
        record.error = f"{where}expected exactly one of prompt, messages or token_ids, got {got}"
        return record
    setattr(record, given[0], data[given[0]])
    record.continue_final_message = data.get("continue_final_message")
    record.options = {
        name: data[name] for name in FIELDS if name in data and name not in _NO_OPTIONS
    }
    stop = record.options.get("stop")
    if stop is not None:
        record.options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    record.unknown_fields = tuple(name for name in data if name not in FIELDS)
    return record


def read_prompts(lines: Iterable[bytes], *, plain_text: bool) -> list[PromptRecord]:
    """All queries of a file or pipe, without blank lines; a query's default id is its line number.

    Args:
        lines: raw lines, with or without their ends.
        plain_text: take a line that does not begin with `{` as the prompt itself.

    Raises:
        EncodingError: the text is encoded in UTF-16 or UTF-32, which has no lines of bytes.
    """
    records = []
    for number, raw in enumerate(lines, start=1):
        if number == 1:
            _check_encoding(raw)
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
        # Absurdly deep nesting or long integers are errors of the line, too.
        except (RecursionError, ValueError) as error:
            message = f"line {number}: not valid JSON ({error})"
            records.append(PromptRecord(id=number, line=number, error=message))
        else:
            records.append(parse_object(data, number, number))
    return records


# The byte order mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def _check_encoding(beginning: bytes) -> None:
    """Rejects the encodings of PowerShell and some editors, once instead of line by line."""
    encoding = next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), None)
    # Without a byte order mark, every second byte of ASCII text is zero.
    if encoding is None and len(beginning) >= 4 and 0 in beginning[:2]:
        encoding = "UTF-16"
    if encoding is not None:
        raise EncodingError(f"must be encoded in UTF-8, got {encoding}; save it as UTF-8")


def read_prompt_file(path: Path) -> list[PromptRecord]:
    """The queries of a file: JSONL if its suffix says so, else lines of plain text or JSON
    objects."""
    with path.open("rb") as stream:
        return read_prompts(stream, plain_text=path.suffix.lower() not in STRICT_SUFFIXES)


def demo_prompts() -> list[PromptRecord]:
    """The 48 prompts that come with the package."""
    resource = resources.files("baton_engines.cli") / "prompts" / "demo.jsonl"
    return read_prompts(resource.read_bytes().splitlines(), plain_text=False)
