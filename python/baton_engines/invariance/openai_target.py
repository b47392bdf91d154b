"""A server with OpenAI's interface as a target.

Answers are streamed, so that requests can arrive late and be cancelled: a server notices a
cancellation when the connection closes. Only the standard library is needed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from .target import Answer, Request, TargetError

_SHOWN = 300


class OpenAITarget:
    """A server.

    Args:
        url: the base URL that the interface's paths are appended to, e.g.
            "http://localhost:8000/v1".
        model: the name that the server knows the model by.
        api: "completions", or "chat" for servers that have only that.
        key: sent as a bearer token, or None.
        timeout: seconds without a byte from the server.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api: Literal["completions", "chat"] = "completions",
        key: str | None = None,
        timeout: float = 600.0,
    ):
        if api not in ("completions", "chat"):
            raise ValueError(f"OpenAITarget: api must be completions or chat, got {api!r}")
        self.name = f"{model} at {url}"
        self._url = url.rstrip("/") + (
            "/completions" if api == "completions" else "/chat/completions"
        )
        self._model = model
        self._api = api
        self._headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Target.ask`."""
        received = _Counts(len(requests))

        def stream(index: int) -> Answer:
            try:
                if index:
                    received.wait(index - 1, requests[index].after)
                return self._stream(requests[index], lambda count: received.put(index, count))
            finally:
                # Threads that wait for its tokens can stop waiting.
                received.put(index, sys.maxsize)

        with ThreadPoolExecutor(len(requests)) as threads:
            return list(threads.map(stream, range(len(requests))))

    def _stream(self, request: Request, on_count: Any) -> Answer:
        tokens: list[int | str] = []
        logprobs: list[float] = []
        limit = request.cancel_after
        try:
            with self._open(request) as response:
                for event in _events(response):
                    if "error" in event:
                        raise TargetError(f"{self._url}: {json.dumps(event)[:_SHOWN]}")
                    for token, logprob in _tokens(event):
                        tokens.append(token)
                        if logprob is not None:
                            logprobs.append(logprob)
                    on_count(len(tokens))
                    if limit is not None and len(tokens) >= limit:
                        break
        except urllib.error.HTTPError as error:
            with contextlib.suppress(OSError):
                said = error.read(_SHOWN).decode(errors="replace")
                raise TargetError(f"{self._url}: HTTP {error.code}: {said}") from error
            raise TargetError(f"{self._url}: HTTP {error.code}") from error
        except (OSError, http.client.HTTPException) as error:
            raise TargetError(f"{self._url}: {error}") from error
        return Answer(tuple(tokens), tuple(logprobs) if len(logprobs) == len(tokens) else ())

    def _open(self, request: Request) -> Any:
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "seed": 0,
            "stream": True,
        }
        if self._api == "chat":
            body["messages"] = [{"role": "user", "content": request.prompt}]
            body["logprobs"] = True
        else:
            body["prompt"] = request.prompt
            body["logprobs"] = 1
        sent = urllib.request.Request(
            self._url, json.dumps(body).encode(), self._headers, method="POST"
        )
        return urllib.request.urlopen(sent, timeout=self._timeout)


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    for line in response:
        text = line.decode(errors="replace").strip()
        if not text.startswith("data:"):
            continue
        data = text.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except json.JSONDecodeError as error:
            raise TargetError(f"an event is not JSON: {data[:_SHOWN]!r}") from error
        if not isinstance(event, dict):
            raise TargetError(f"an event is not an object: {data[:_SHOWN]!r}")
        yield event


def _tokens(event: dict[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Tokens and their log-probabilities, in either of the two formats in use."""
    for choice in event.get("choices") or ():
        logprobs = choice.get("logprobs") or {}
        if logprobs.get("content"):
            for entry in logprobs["content"]:
                yield entry["token"], entry.get("logprob")
        elif logprobs.get("tokens"):
            yield from zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
        else:
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text:
                yield text, None


class _Counts:
    """The number of tokens that each request has received; threads can wait for a count."""

    def __init__(self, requests: int):
        self._counts = [0] * requests
        self._change = threading.Condition()

    def put(self, index: int, count: int) -> None:
        with self._change:
            self._counts[index] = max(count, self._counts[index])
            self._change.notify_all()

    def wait(self, index: int, count: int) -> None:
        with self._change:
            self._change.wait_for(lambda: self._counts[index] >= count)
