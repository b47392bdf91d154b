"""The command `baton serve`: one relay behind OpenAI's interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from . import options
from .errors import CommandError

_BYTES_PER_MIB = 2**20


@dataclass(frozen=True)
class Listening:
    """What is served where."""

    model: options.ModelOption = "smollm2"
    host: Annotated[
        str, typer.Option(help="Where to listen; who reaches it is served, there are no keys.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000


@options.of_groups
def serve(listening: Listening, batching: options.Batching) -> None:
    """Serve completions and chat completions as OpenAI's interface has them, whole and streamed.

    A client that leaves frees its slot. Ctrl-C ends it when the running requests have ended, a
    second one at once.
    """
    policy = batching.make_policy()
    # Torch and the server are loaded when they are needed.
    import torch

    from ..llama import load_model
    from ..prefill import get as get_prefiller

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
    budget, threads = batching.kv_budget, batching.prefill_threads
    try:
        run(
            model,
            tokenizer,
            listening.model,
            host=listening.host,
            port=listening.port,
            num_slots=batching.slots,
            capacity=batching.capacity,
            policy=policy,
            prefill=get_prefiller(
                batching.prefill, **({} if threads is None else {"threads": threads})
            ),
            max_slots=batching.max_slots,
            kv_budget=None if budget is None else int(budget * _BYTES_PER_MIB),
            kv_dtype=batching.kv_dtype and batching.kv_dtype.value,
        )
    # No Llama, or one with something that the patch does not know; a process that cannot start; no
    # package for the mode.
    except (ImportError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error
