"""One query: its tokens, how they are chosen, when it ends."""

from .query import Query, decode_text

__all__ = ["Query", "decode_text"]
