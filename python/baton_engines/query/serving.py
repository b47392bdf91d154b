"""The engine's state of a running query, apart from its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .sampler import Sampler
from .stopping import Stopper, TextPieces


class TextListener(NamedTuple):
    """The callback for a query's text, and how much text it has received."""

    on_text: Callable[..., object]
    pieces: TextPieces


@dataclass(frozen=True)
class Serving:
    """How a query's tokens are chosen, when it ends, and which callbacks it has.

    Attributes:
        sampler: chooses its tokens.
        stopper: its stop conditions.
        on_token: called with the query and every token; may be None.
        listener: receives its text; may be None.
    """

    sampler: Sampler
    stopper: Stopper
    on_token: Callable[..., object] | None = None
    listener: TextListener | None = None
