"""Int8 weights compared with the model's own dtype: perplexity, greedy tokens, bytes, speed.

Perplexity is measured on a text in bench/data or on any other, in windows of the same length; every
token except a window's first counts once. Greedy tokens are compared where both models have read
the same tokens: the most likely next token after each token of the text. With --rows, decode steps
are timed as well, with the two dtypes in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from baton_engines import Relay, patch_llama

from . import describe_run, perplexity


def step_seconds(models: Sequence[Any], rows: int, columns: int, steps: int) -> list[float]:
    """Median seconds of a decode step of each model; the models take turns.

    Args:
        models: patched ones.
        rows: queries that decode.
        columns: tokens of each, when the first of the steps begins.
        steps: number of timed steps.
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
    perplexity.add_options(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[], help="of decode steps to time")
    parser.add_argument("--columns", type=int, default=128, help="of each of these rows")
    parser.add_argument("--steps", type=int, default=40, help="of each dtype")
    arguments = parser.parse_args(argv)
    model, _, token_ids = perplexity.load(parser, arguments)
    print(f"{arguments.model}, {len(token_ids)} tokens of {arguments.text.name}\n{describe_run()}")
    readings = []
    print(f"{'weights':<10}{'MB':>8}{'perplexity':>12}")
    for name, weight_dtype in ((arguments.dtype, None), ("int8", "int8")):
        with patch_llama(model, weight_dtype=weight_dtype, keep_parameters=True) as llama:
            reading = perplexity.read(llama, token_ids, arguments.window)
            print(f"{name:<10}{llama.weight_bytes / 1e6:>8.1f}{reading.perplexity:>12.4f}")
        readings.append(reading)
    exact, rounded = readings
    same, change = rounded.same_likeliest(exact), rounded.perplexity / exact.perplexity - 1
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
