"""One query: its tokens, how they are chosen, and when it ends."""

from .query import Query, SharedPrompt, wait_in_order
from .text import decode_text

__all__ = ["Query", "SharedPrompt", "decode_text", "wait_in_order"]
