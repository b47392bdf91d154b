"""Runs cells and collects their results in one dictionary, ready for JSON."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from baton_engines.cli.prompts_io import demo_prompts
from baton_engines.llama.load import load_model

from .. import describe_run
from .cells import Cell
from .limit import Ceiling, Sizes, measure_ceiling
from .measure import Session

Report = Callable[[str], object]
# A Llama of 124 million parameters with equal numbers of query and key heads: it has twice the
# cache of SmolLM2 per layer and head, and needs no file.
RANDOM_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 14,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


def load(name: str, dtype: str, device: str = "cpu") -> tuple[Any, list[int]]:
    """A model on a device, and a stream of tokens that prompts are taken from.

    For SmolLM2 these are the demo's prompts, joined; for a random model, random tokens.
    """
    if name == "smollm2":
        model, tokenizer = load_model(name, dtype=dtype)
        model.set_attn_implementation("sdpa")
        stream = [token for record in demo_prompts() for token in record.encode(tokenizer)]
        return model.to(device), stream
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**RANDOM_SIZES, attn_implementation="sdpa")
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        stream = torch.randint(RANDOM_SIZES["vocab_size"], (9973,)).tolist()
    return model.to(device), stream


def evaluate(
    cells: Sequence[Cell],
    *,
    engines: Sequence[str] = (),
    device: str = "cpu",
    report: Report = print,
) -> dict[str, Any]:
    """Measures cells, in their order within each model.

    Args:
        cells: what to run.
        engines: other engines that run the cells with `peers`, on the CPU.
        device: of the model: "cpu" or "cuda".
        report: called with lines of progress.

    Raises:
        GateError: systems that must agree gave different tokens.
    """
    begin = time.perf_counter()
    groups: dict[tuple[str, str], list[int]] = {}
    for index, cell in enumerate(cells):
        groups.setdefault((cell.model, cell.dtype), []).append(index)
    measured: dict[int, dict[str, Any]] = {}
    ceilings: dict[str, Ceiling] = {}
    with quiet_transformers():
        for (name, dtype), indices in groups.items():
            report(f"{name} in {dtype}: {len(indices)} cells")
            model, stream = load(name, dtype, device)
            kind = getattr(torch, dtype)
            ceiling = measure_ceiling(kind, device=device)
            with Session(model, stream, Sizes.of(model.config, kind), report) as session:
                for index in indices:
                    cell = cells[index]
                    report(f"cell {len(measured) + 1} of {len(cells)}: {cell.title}")
                    at = time.perf_counter()
                    # A maximum can only get closer to the truth when it is measured again before
                    # each cell.
                    ceiling = ceiling.best(measure_ceiling(kind, 2, device))
                    measured[index] = session.measure(cell, ceiling, engines if cell.peers else ())
                    measured[index]["wall_seconds"] = time.perf_counter() - at
            ceilings[dtype] = ceilings.get(dtype, ceiling).best(ceiling)
    return {
        "machine": describe_run(device),
        "date": time.strftime("%Y-%m-%d"),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begin,
        "ceilings": {
            dtype: {"flops": c.flops, "read_bytes": c.read_bytes} for dtype, c in ceilings.items()
        },
        "cells": [measured[index] for index in range(len(cells))],
    }


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences transformers' warnings: the end of sequence is deliberately not a token."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
