"""The command `baton serve`: one relay behind OpenAI's interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from . import options
from .errors import CommandError


@dataclass(frozen=True)
class Listening:
    """Options for the model that is served, and the address."""

    model: options.ModelOption = "smollm2"
    host: Annotated[str, typer.Option(help="Address to listen on. There is no authentication.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 8000


@options.of_groups
def serve(listening: Listening, batching: options.Batching) -> None:
    """Serve completions and chat completions in OpenAI's format, whole and streamed.

    When a client disconnects, its slot is freed. Ctrl-C stops after the running requests have
    ended, a second Ctrl-C at once.
    """
    policy = batching.make_policy()
    # Torch and the server are imported only when they are needed.
    import torch

    from ..llama import load_model

    try:
        from ..serve.server import serve as run
    except ImportError as error:
        raise CommandError(
            f"baton serve needs {error.name}, which the extra `serve` brings: "
            "pip install 'baton_kernels[serve]'"
        ) from error

    if batching.threads is not None:
        torch.set_num_threads(batching.threads)
    model, tokenizer = load_model(listening.model, batching.dtype.value)
    if tokenizer is None:
        raise CommandError(f"model must have a tokenizer, got none in {listening.model}")
    try:
        run(
            model,
            tokenizer,
            listening.model,
            host=listening.host,
            port=listening.port,
            capacity=batching.capacity,
            policy=policy,
            **batching.relay_options(),
        )
    # The model is not a supported Llama, a process cannot start, or a package is missing.
    except (ImportError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
