"""One query: its tokens, how they are chosen, when it ends."""

from .query import Query, decode_text, wait_in_order

__all__ = ["Query", "decode_text", "wait_in_order"]
