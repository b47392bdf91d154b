"""Serves one relay in one process: the application on uvicorn."""

from __future__ import annotations

import copy
from typing import Any

import uvicorn

from ..relay import Relay
from .app import make_app
from .engine import Engine


def serve(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    capacity: int | None = None,
    **options: Any,
) -> None:
    """Serve OpenAI's completions and chat completions until SIGINT or SIGTERM.

    Args:
        model: see `Relay`.
        tokenizer: of Hugging Face.
        name: the model's name for clients.
        host: where to listen. Everybody who can reach it is served: there are no keys and no TLS;
            put a proxy with these in front.
        port: where to listen; 0 chooses a free one.
        capacity: see `Relay`.
        options: of the `Relay`.

    Raises:
        Exception: what `Relay` raises.
    """
    if capacity is None:
        capacity = model.config.max_position_embeddings
    engine = Engine(lambda: Relay(model, capacity=capacity, tokenizer=tokenizer, **options))
    try:
        # A tokenizer must be used by one thread only.
        app = make_app(engine, copy.deepcopy(tokenizer), name, capacity)
        uvicorn.run(app, host=host, port=port, log_level="info")
    finally:
        engine.close()
