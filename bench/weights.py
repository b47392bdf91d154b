"""Weights rounded to int8 beside the model's own dtype: perplexity, greedy tokens, bytes, speed.

Perplexity is that of a text that lies in bench/data, or of any other, in windows of the same
length; each token but a window's first counts once. Greedy tokens are compared where both models
have seen the same ones before: the likeliest next token after each token of the text. With --rows
decode steps are timed as well, one of each dtype in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from baton_engines import PackedBatch, Relay, load_model, patch_llama

from . import describe_run

TEXT = Path(__file__).parent / "data" / "prose.txt"


class Reading(NamedTuple):
    """What a model makes of a text.

    Attributes:
        losses: float64, minus the logarithm of the probability of each token.
        likeliest: int64, the likeliest token in each of these places.
        weight_bytes: of the packed weights.
    """

    losses: torch.Tensor
    likeliest: torch.Tensor
    weight_bytes: int

    @property
    def perplexity(self) -> float:
        """Of a token, on average."""
        return math.exp(self.losses.mean().item())


def read(model: Any, token_ids: torch.Tensor, window: int, weight_dtype: str | None) -> Reading:
    """The text as the patched model reads it.

    Args:
        model: a transformers model; it is patched, and keeps its parameters.
        token_ids: `[tokens]`.
        window: tokens that are read together.
        weight_dtype: see `patch_llama`.
    """
    losses, likeliest = [], []
    with patch_llama(model, weight_dtype=weight_dtype, keep_parameters=True) as llama:
        for ids in token_ids.split(window):
            cache = llama.new_cache(1, len(ids))
            slot = cache.allocate(len(ids))
            batch = PackedBatch.from_shape(cache.shape, [slot], [len(ids)])
            logits = llama.forward(ids, batch, cache, logits="all")[:-1].double()
            losses.append(-logits.log_softmax(1).gather(1, ids[1:, None])[:, 0])
            likeliest.append(logits.argmax(1))
        weight_bytes = llama.weight_bytes
    return Reading(torch.cat(losses), torch.cat(likeliest), weight_bytes)


def step_seconds(models: Sequence[Any], rows: int, columns: int, steps: int) -> list[float]:
    """Seconds of a decode step of each model, which take turns; medians.

    Args:
        models: patched ones.
        rows: queries that decode.
        columns: tokens of each, when the first of the steps begins.
        steps: that are timed.
    """
    with contextlib.ExitStack() as stack:
        relays = []
        for model in models:
            relay = stack.enter_context(Relay(model, rows, columns + steps + 4))
            generator = torch.Generator().manual_seed(0)
            for _ in range(rows):
                ids = torch.randint(model.vocab_size, (columns,), generator=generator)
                relay.submit(ids, max_new_tokens=steps + 4, eos=None)
            while relay.waiting or any(query.prompt_left for query in relay.running):
                relay.step()
            relay.step()
            relays.append(relay)
        times: list[list[float]] = [[] for _ in relays]
        for _ in range(steps):
            for relay, taken in zip(relays, times, strict=True):
                begin = time.perf_counter()
                relay.step()
                taken.append(time.perf_counter() - begin)
    return [statistics.median(taken) for taken in times]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="of decode steps to time")
    parser.add_argument("--columns", type=int, default=128, help="of each of these rows")
    parser.add_argument("--steps", type=int, default=40, help="of each dtype")
    arguments = parser.parse_args(argv)
    if arguments.window < 2:
        parser.error(f"--window must be at least 2, got {arguments.window}")
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    if tokenizer is None:
        parser.error(f"--model must have a tokenizer, got none in {arguments.model}")
    text = arguments.text.read_text(encoding="utf-8")
    token_ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(token_ids) < 2:
        parser.error(f"--text must hold at least 2 tokens, got {len(token_ids)}")
    print(f"{arguments.model}, {len(token_ids)} tokens of {arguments.text.name}\n{describe_run()}")
    exact = read(model, token_ids, arguments.window, None)
    rounded = read(model, token_ids, arguments.window, "int8")
    print(f"{'weights':<10}{'MB':>8}{'perplexity':>12}")
    for name, reading in ((arguments.dtype, exact), ("int8", rounded)):
        print(f"{name:<10}{reading.weight_bytes / 1e6:>8.1f}{reading.perplexity:>12.4f}")
    same = (exact.likeliest == rounded.likeliest).double().mean().item()
    change = rounded.perplexity / exact.perplexity - 1
    print(f"perplexity {change:+.2%}, the same likeliest token after {same:.1%} of the tokens")
    if arguments.rows:
        with (
            patch_llama(copy.deepcopy(model)) as own,
            patch_llama(model, weight_dtype="int8") as low,
        ):
            for rows in arguments.rows:
                seconds = step_seconds([own, low], rows, arguments.columns, arguments.steps)
                own_ms, low_ms = (1e3 * x for x in seconds)
                print(
                    f"{rows} rows of {arguments.columns} columns: {own_ms:.2f} and {low_ms:.2f} ms "
                    f"a step, int8 {own_ms / low_ms:.2f}x the tokens/s"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
