"""A patched model's predictions for a text: the loss of each token, and the logits before it.

The text is read in windows of the same length; every token except a window's first counts once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baton_engines import PackedBatch, load_model

TEXT = Path(__file__).parent / "data" / "prose.txt"


class Reading(NamedTuple):
    """A model's predictions for a text.

    Attributes:
        losses: float64, minus the logarithm of the probability of each token.
        logits: float32 `[places, vocab]`, one row per token of `losses`.
    """

    losses: torch.Tensor
    logits: torch.Tensor

    @property
    def perplexity(self) -> float:
        """The mean perplexity of a token."""
        return math.exp(self.losses.mean().item())

    def same_likeliest(self, other: Reading) -> float:
        """The share of places where both have the same most likely token."""
        return (self.logits.argmax(1) == other.logits.argmax(1)).double().mean().item()


def read(llama: Any, token_ids: torch.Tensor, window: int, kv_dtype: Any = None) -> Reading:
    """Reads the text through a cache of this dtype.

    Args:
        llama: from `patch_llama`.
        token_ids: `[tokens]`.
        window: tokens that are read together, at least 2.
        kv_dtype: None for the model's.
    """
    losses, logits = [], []
    for ids in token_ids.split(window):
        cache = llama.new_cache(1, len(ids), dtype=kv_dtype)
        batch = PackedBatch.from_shape(cache.shape, [cache.allocate(len(ids))], [len(ids)])
        found = llama.forward(ids, batch, cache, logits="all")[:-1]
        losses.append(-found.double().log_softmax(1).gather(1, ids[1:, None])[:, 0])
        logits.append(found)
    return Reading(torch.cat(losses), torch.cat(logits))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for the model, the text and its windows."""
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)


def load(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Any, Any, Any]:
    """The model, tokenizer and text tokens that the options select."""
    if options.window < 2:
        parser.error(f"--window must be at least 2, got {options.window}")
    model, tokenizer = load_model(options.model, dtype=options.dtype)
    if tokenizer is None:
        parser.error(f"--model must have a tokenizer, got none in {options.model}")
    text = options.text.read_text(encoding="utf-8")
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(token_ids) < 2:
        parser.error(f"--text must hold at least 2 tokens, got {len(token_ids)}")
    return model, tokenizer, token_ids
