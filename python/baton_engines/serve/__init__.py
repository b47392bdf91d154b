"""Serving a relay: an OpenAI-compatible interface on one process, or on replicas of Ray Serve."""

from .engine import BadRequestError, Engine, Piece

__all__ = ["BadRequestError", "Engine", "Piece"]
