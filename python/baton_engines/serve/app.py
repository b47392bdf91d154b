"""OpenAI's interface as a FastAPI application: completions and chat, whole or streamed.

It depends neither on the relay nor on Ray: answers come from a `Generator`. When a client
disconnects, its queries are cancelled, whether they are waiting or running.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request as HttpRequest

from .engine import BadRequestError, Generator, Piece
from .requests import ChatRequest, CompletionRequest
from .responses import ChatCompletions, Completions, error_of, usage_of

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
# The status that servers log for a client that has disconnected; it is not sent.
_CLIENT_LEFT = 499


class _ClientLeftError(Exception):
    """The client has disconnected, so the answer is not needed any more."""


def make_app(generator: Generator, tokenizer: Any, model: str, capacity: int) -> FastAPI:
    """The application.

    Args:
        generator: provides the answers.
        tokenizer: of Hugging Face; must not be shared, because the application's thread uses it.
        model: the name under which the model is listed.
        capacity: the most tokens of a prompt and its answer.
    """
    app = FastAPI(title="baton", docs_url=None, redoc_url=None)
    about = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "baton"}

    @app.get("/health")
    async def health() -> Response:
        try:
            generator.check()
        except RuntimeError as error:
            return JSONResponse(error_of(str(error), "server_error"), 503)
        return Response()

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        return await respond(body, Completions(model, tokenizer), http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        return await respond(body, ChatCompletions(model, tokenizer), http)

    async def respond(
        body: CompletionRequest | ChatRequest, objects: Completions, http: HttpRequest
    ) -> Response:
        if body.model not in (None, model):
            message = f"model must be {model!r}, got {body.model!r}"
            return JSONResponse(error_of(message, "not_found_error"), 404)
        prompts, options = body.prompts(tokenizer), body.options()
        streams = []
        for prompt in prompts:
            longest = max(1, capacity - len(prompt))
            for number in range(body.n):
                own = {**options, "max_new_tokens": options["max_new_tokens"] or longest}
                if body.seed is not None:
                    own["seed"] = body.seed + number
                streams.append(generator.generate(prompt, **own))
        pieces = _merged(streams)
        if not body.stream:
            answers = await _unless_client_leaves(http, _whole(pieces, len(streams)))
            usage = usage_of(prompts, sum(len(answer.tokens) for answer in answers))
            return JSONResponse(objects.answer(answers, usage))
        # Before the response begins, errors in the request can still set its status.
        first = await _unless_client_leaves(http, anext(pieces))
        events = _events(objects, first, pieces, len(streams), prompts, body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream")

    @app.exception_handler(BadRequestError)
    async def bad_request(http: HttpRequest, error: BadRequestError) -> Response:
        return JSONResponse(error_of(str(error)), 400)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        faults = [f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in error.errors()]
        return JSONResponse(error_of("; ".join(faults)), 400)

    @app.exception_handler(_ClientLeftError)
    async def client_left(http: HttpRequest, error: _ClientLeftError) -> Response:
        return Response(status_code=_CLIENT_LEFT)

    @app.exception_handler(Exception)
    async def failed(http: HttpRequest, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        return JSONResponse(error_of(str(error), "server_error"), 500)

    return app


async def _merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of several answers as they come, each with its answer's index.

    Raises:
        Exception: the first error of any of them; the others are cancelled.
    """
    items: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[Piece]) -> None:
        try:
            async for piece in stream:
                items.put_nowait((index, piece))
        except Exception as error:
            items.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, each)) for index, each in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            index, item = await items.get()
            if isinstance(item, Exception):
                raise item
            left -= item.finish_reason is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(pieces: AsyncIterator[tuple[int, Piece]], count: int) -> list[Piece]:
    """This many answers, each as one piece."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    async with contextlib.aclosing(pieces):  # type: ignore[type-var]
        async for index, piece in pieces:
            parts[index].append(piece)
    return [
        Piece(
            "".join(part.text for part in own),
            [token for part in own for token in part.tokens],
            None
            if own[-1].logprobs is None
            else [one for part in own for one in part.logprobs or []],
            own[-1].finish_reason,
        )
        for own in parts
    ]


async def _events(
    objects: Completions,
    first: tuple[int, Piece],
    pieces: AsyncIterator[tuple[int, Piece]],
    count: int,
    prompts: Sequence[Sequence[int]],
    include_usage: bool,
) -> AsyncIterator[str]:
    """The server-sent events of a stream."""
    num_tokens = 0
    async with contextlib.aclosing(pieces):  # type: ignore[type-var]
        for opening in objects.openings(count):
            yield _event(opening)
        try:
            item: tuple[int, Piece] | None = first
            while item is not None:
                index, piece = item
                num_tokens += len(piece.tokens)
                yield _event(objects.chunk(index, piece))
                item = await anext(pieces, None)
        # The response has already begun, so an error can only be reported as an event.
        except Exception as error:
            _log.error("a stream failed", exc_info=error)
            yield _event(error_of(str(error), "server_error"))
            return
    if include_usage:
        yield _event(objects.usage_chunk(usage_of(prompts, num_tokens)))
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _unless_client_leaves(http: HttpRequest, result: Awaitable[_Result]) -> _Result:
    """The result; it is cancelled if the client disconnects before it is ready.

    Raises:
        _ClientLeftError: the client has disconnected.
        Exception: what the result raises.
    """
    work = asyncio.ensure_future(result)
    leaving = asyncio.ensure_future(_client_left(http))
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise _ClientLeftError
        return work.result()
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


async def _client_left(http: HttpRequest) -> None:
    # The body has been read; the only message still to come is the disconnect.
    while (await http.receive())["type"] != "http.disconnect":
        pass
