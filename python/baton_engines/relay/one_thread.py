"""Methods of an object that belongs to one thread at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def one_thread(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Rejects a call while another thread is in a call, before anything has changed.

    Calls from callbacks come from the same thread, so they pass. Another thread may take the object
    over between two calls.

    Raises:
        RuntimeError: another thread is in a call of an object with the same `_in_use`, an RLock.
    """

    @functools.wraps(method)
    def guarded(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        if not self._in_use.acquire(blocking=False):
            raise RuntimeError(
                f"{type(self).__name__}.{method.__name__}: calls must come from one thread, got "
                f"one from {threading.current_thread().name} while another thread is in a call; "
                "send calls from other threads to the thread that owns the relay"
            )
        try:
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return guarded
