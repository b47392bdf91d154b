"""The decode loop that hands slots from finished queries to new ones."""

from ..query import Query
from .relay import Relay

__all__ = ["Query", "Relay"]
