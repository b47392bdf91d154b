"""OpenAI's objects: completions, chat completions, their chunks, and errors."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..query.query import TokenLogprobs
from .engine import Piece


class Completions:
    """Response objects for one request to /v1/completions.

    Args:
        model: its name.
        tokenizer: of Hugging Face; decodes single tokens.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Any):
        self._tokenizer = tokenizer
        self._about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, answers: Sequence[Piece], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(index, piece) for index, piece in enumerate(answers)]
        return {**self._about, "object": self.kind, "choices": choices, "usage": usage}

    def openings(self, count: int) -> list[dict[str, Any]]:
        """The chunks that come before those with text, for `count` choices."""
        return []

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """A part of choice `index`."""
        return self._chunk([self._part(index, piece)])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last chunk of a stream that ends with token counts."""
        return {**self._chunk([]), "usage": usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._about, "object": self.chunk_kind, "choices": choices}

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._part(index, piece)

    def _part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {
            "index": index,
            "text": piece.text,
            "logprobs": None if piece.logprobs is None else self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        texts = [self._text(one.token) for one in logprobs]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [
                {self._text(token): logprob for token, logprob in one.top} for one in logprobs
            ],
            "text_offset": [sum(map(len, texts[:index])) for index in range(len(texts))],
        }

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class ChatCompletions(Completions):
    """Response objects for one request to /v1/chat/completions; see `Completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def openings(self, count: int) -> list[dict[str, Any]]:
        """Chunks that announce the assistant's role."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([{"index": index, "delta": delta, "finish_reason": None}])
            for index in range(count)
        ]

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._with(index, piece, "message", {"role": "assistant", "content": piece.text})

    def _part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._with(index, piece, "delta", {"content": piece.text} if piece.text else {})

    def _with(self, index: int, piece: Piece, name: str, value: Any) -> dict[str, Any]:
        return {
            "index": index,
            name: value,
            "logprobs": None if piece.logprobs is None else self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any]:
        return {
            "content": [
                {
                    **self._one(each.token, each.logprob),
                    "top_logprobs": [self._one(*other) for other in each.top],
                }
                for each in logprobs
            ]
        }

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage_of(prompts: Sequence[Sequence[int]], num_tokens: int) -> dict[str, int]:
    """The token counts of a request; each prompt counts once."""
    num_prompt = sum(map(len, prompts))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt + num_tokens,
    }


def error_of(message: str, kind: str = "invalid_request_error") -> dict[str, Any]:
    """An error in the interface's format."""
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
