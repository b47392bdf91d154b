"""Serving a relay: an OpenAI-compatible interface in one process, or with replicas of Ray Serve."""

from .engine import BadRequestError, Engine, Piece

__all__ = ["BadRequestError", "Engine", "Piece"]
