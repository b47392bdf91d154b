"""Calls the callbacks of `Relay.submit`: on_token with every token, on_text with pieces of text."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from .query import Query
from .serving import TextListener
from .text import decode_text


def check_callback(name: str, callback: object) -> None:
    """Raise unless a callback can be called between two steps.

    Args:
        name: of the argument.
        callback: None, or the argument.

    Raises:
        TypeError: it cannot be called, or would have to be awaited.
    """
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(f"Relay.submit: {name} must be callable, got {callback!r}")
    kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
    function = getattr(callback, "__call__", None)  # noqa: B004  the method of a callable object
    if any(kind(one) for kind in kinds for one in (callback, function)):
        raise TypeError(
            f"Relay.submit: {name} must be a plain function, because it is not awaited, got "
            f"the async {callback!r}; it can put its argument into a queue"
        )


def call(callback: Callable[..., object], query: Query, value: object) -> None:
    """Call a callback.

    Raises:
        TypeError: it returned something that would have to be awaited.
        Exception: what it raises.
    """
    result = callback(query, value)
    if inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()
        raise TypeError(f"a callback must not return an awaitable, got {result!r}")


def give_text(query: Query, listener: TextListener, has_ended: bool) -> None:
    """Calls a query's on_text with the text that its newest token made certain.

    Args:
        query: has the token and has not ended.
        listener: the query's. Written: how much text it has received.
        has_ended: whether the token is the last one; everything held back is then passed on.
    """
    if has_ended:
        piece = listener.pieces.finish(final_text(query))
    else:
        piece = listener.pieces.push(query.tokens[-1])
    if piece:
        call(listener.on_text, query, piece)


def final_text(query: Query) -> str:
    """The whole text of a query whose last token has arrived, before the relay ends it."""
    text = query.serving.stopper.text
    return decode_text(query.tokenizer, query.tokens) if text is None else text
