"""What the engine keeps of a query while it lives, apart from its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from .sampler import Sampler
from .stopping import Stopper, TextPieces


class TextListener(NamedTuple):
    """Who is told a query's text, and how far it has been told."""

    on_text: Callable[..., object]
    pieces: TextPieces


@dataclass(frozen=True)
class Serving:
    """How a query's tokens are chosen, when it ends, and who listens.

    Attributes:
        sampler: chooses its tokens.
        stopper: its stop conditions.
        on_token: called with the query and every token; None for nobody.
        listener: is told its text; None for nobody.
    """

    sampler: Sampler
    stopper: Stopper
    on_token: Callable[..., object] | None = None
    listener: TextListener | None = None
