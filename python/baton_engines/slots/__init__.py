"""The rows of one KV cache and the queries in them."""

from .slots import SHAPINGS, Row, Slots

__all__ = ["SHAPINGS", "Row", "Slots"]
