"""A relay in a separate thread, for callers in an event loop.

Only that thread uses the relay. Callers send it functions, and receive pieces of their answers in a
queue of the caller's event loop, at most one per decode step.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple, Protocol

from ..query import Query
from ..query.query import TokenLogprobs
from ..relay import Relay


class BadRequestError(ValueError):
    """A request is invalid; other requests are not affected."""


class Piece(NamedTuple):
    """A part of an answer.

    Attributes:
        text: the text that has become certain since the last piece.
        tokens: the ids since the last piece.
        logprobs: those of these tokens, if the request has `logprobs`.
        finish_reason: "stop", "length" or "cancelled" in the last piece, else None.
    """

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None


class Generator(Protocol):
    """The source of answers for the interface: an `Engine`, or something that finds one."""

    def generate(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[Piece]:
        """See `Engine.generate`."""

    def check(self) -> None:
        """Raise if no answers can be expected."""


class Engine:
    """Answers requests through a relay that lives in a thread of this object.

    Args:
        make_relay: called once in the thread; the relay needs its tokenizer.

    Raises:
        Exception: what `make_relay` raises.
    """

    def __init__(self, make_relay: Callable[[], Relay]):
        self._make_relay = make_relay
        self._calls: queue.SimpleQueue[Callable[[Relay], object] | None] = queue.SimpleQueue()
        self._requests: set[_Request] = set()
        self._failure: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="baton-relay", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise self._failure

    async def generate(self, prompt: Sequence[int], **options: Any) -> AsyncIterator[Piece]:
        """The answer in pieces; closing the iterator cancels it.

        Args:
            prompt: token ids.
            options: of `Relay.submit`, without callbacks.

        Raises:
            BadRequestError: the relay refuses the prompt or an option.
            RuntimeError: the engine is closed, or its relay has failed.
            Exception: the query's own error.
        """
        self.check()
        request = _Request(prompt, options, asyncio.get_running_loop())
        self._calls.put(lambda relay: self._submit(relay, request))
        self.check()
        try:
            while True:
                item = await request.items.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            self._calls.put(lambda relay: self._drop(relay, request))

    def check(self) -> None:
        """Raise unless the relay is running.

        Raises:
            RuntimeError: the engine is closed, or its relay has failed.
        """
        if self._failure is not None:
            raise RuntimeError(f"Engine: relay must run, got {self._failure!r}")

    @property
    def num_requests(self) -> int:
        """Requests that have not ended, including those that wait for a slot."""
        return len(self._requests)

    def close(self) -> None:
        """Cancel requests that have not ended, and close the relay."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            relay = self._make_relay()
        except BaseException as error:
            self._failure = error
            self._started.set()
            return
        self._started.set()
        try:
            with relay:
                self._serve(relay)
            self._failure = RuntimeError("Engine: engine must be open, got a closed one")
        except BaseException as error:
            self._failure = error
        finally:
            for request in self._requests:
                request.put(RuntimeError(f"Engine: relay must run, got {self._failure!r}"))
            self._requests.clear()
            # Requests that arrived meanwhile: the closed relay rejects them. Later ones see the
            # failure.
            with contextlib.suppress(queue.Empty):
                while True:
                    call = self._calls.get_nowait()
                    if call is not None:
                        call(relay)

    def _serve(self, relay: Relay) -> None:
        more = False
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    # Without anything to do, wait for the next call.
                    call = self._calls.get(block=not more)
                    if call is None:
                        return
                    call(relay)
                    more = True
            more = relay.step()
            for request in [one for one in self._requests if one.report()]:
                self._requests.remove(request)

    def _submit(self, relay: Relay, request: _Request) -> None:
        if request.dropped:
            return
        try:
            request.query = relay.submit(
                request.prompt, on_text=request.take_text, **request.options
            )
        # The relay is closed, or has no such option.
        except Exception as error:
            request.put(error)
        else:
            self._requests.add(request)

    def _drop(self, relay: Relay, request: _Request) -> None:
        request.dropped = True
        if request.query is not None:
            relay.cancel(request.query)
        self._requests.discard(request)


class _Request:
    """One answer in the making, between the relay's thread and the caller's loop."""

    def __init__(
        self, prompt: Sequence[int], options: dict[str, Any], loop: asyncio.AbstractEventLoop
    ):
        self.prompt = prompt
        self.options = options
        self.items: asyncio.Queue[Piece | BaseException] = asyncio.Queue()
        self.query: Query | None = None
        self.dropped = False
        self._loop = loop
        self._text = ""
        self._num_told = 0

    def take_text(self, query: Query, text: str) -> None:
        """A callback of the relay."""
        self._text += text

    def report(self) -> bool:
        """Send the caller what is new; returns whether the answer has ended."""
        query = self.query
        assert query is not None
        if query.error is not None:
            error: Exception = query.error
            if not query.tokens and isinstance(error, (ValueError, TypeError)):
                error = BadRequestError(str(error))
            self.put(error)
            return True
        if self._text or query.ended:
            first = self._num_told
            self._num_told = len(query.tokens)
            logprobs = None if query.logprobs is None else query.logprobs[first:]
            reason = None
            if query.ended:
                reason = {"eos": "stop"}.get(query.finish_reason or "", query.finish_reason)
            self.put(Piece(self._text, query.tokens[first:], logprobs, reason))
            self._text = ""
        return query.ended

    def put(self, item: Piece | BaseException) -> None:
        """Send it to the caller if its event loop is still running."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.items.put_nowait, item)
