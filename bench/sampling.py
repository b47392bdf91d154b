"""The share of a decode step for choosing tokens: greedy, with penalties, sampled, and combined.

A relay of SmolLM2 decodes the same number of rows for each kind of options. Choosing is timed on
the relay's current logits and answers, in turns with its own steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from baton_engines import Relay, load_model
from baton_engines.cli.prompts_io import demo_prompts
from baton_engines.query.sampler import Sampler
from baton_engines.query.sampling import choose
from baton_engines.query.sampling_options import SamplingOptions
from baton_kernels import likeliest
from bench import describe_run, spread

PENALTIES = {"repetition_penalty": 1.2, "frequency_penalty": 0.1, "presence_penalty": 0.1}
KINDS = {
    "greedy": {},
    "penalties": PENALTIES,
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
    "all of it": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02, **PENALTIES},
}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10, help="steps that are timed")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model, tokenizer = load_model(arguments.model)
    print(describe_run())
    # Real text, because the number of tokens that top_p keeps depends on how certain the model is.
    prompts = [record.encode(tokenizer) for record in demo_prompts()]
    steps, costs = measure(
        model, list(itertools.islice(itertools.cycle(prompts), arguments.rows)), arguments.repeats
    )
    step = statistics.median(steps)
    print(f"{arguments.rows} rows; a greedy decode step: {spread(steps, '{:.1f}')} ms")
    print(f"{'options':12} {'ms per step':>18} {'more than greedy, of a step':>28}")
    plain = statistics.median(costs["greedy"])
    for kind, values in costs.items():
        share = (statistics.median(values) - plain) / step
        print(f"{kind:12} {spread(values):>18} {share:>28.1%}")


def measure(
    model: Any, prompts: Sequence[Sequence[int]], repeats: int
) -> tuple[list[float], dict[str, list[float]]]:
    """Milliseconds of whole steps, and of choosing the tokens of all rows by kind of options."""
    # Two steps to warm up, and one more so that no query ends.
    most = repeats + 4
    steps: list[float] = []
    costs: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with Relay(model, len(prompts), max(map(len, prompts)) + most) as relay:
        queries = [relay.submit(ids, max_new_tokens=most, eos=None) for ids in prompts]
        latest: dict[int, torch.Tensor] = {}
        relay._batch.on_logits = lambda query, row: latest.__setitem__(query.id, row)
        samplers = {
            kind: [Sampler(SamplingOptions(**options), q.id, q.prompt) for q in queries]
            for kind, options in KINDS.items()
        }
        relay.step()
        for number in range(repeats + 2):
            begin = time.perf_counter()
            relay.step()
            seconds = time.perf_counter() - begin
            logits = torch.stack([latest[query.id] for query in queries])
            answers = [query.tokens[:-1] for query in queries]
            for kind, own in samplers.items():
                begin = time.perf_counter()
                if kind == "greedy":
                    chosen = likeliest(logits).tolist()
                else:
                    chosen = choose(own, answers, logits)
                if number >= 2:
                    costs[kind].append(1e3 * (time.perf_counter() - begin))
                if kind == "greedy":
                    check(chosen, [query.tokens[-1] for query in queries])
            if number >= 2:
                steps.append(1e3 * seconds)
    return steps, costs


def check(chosen: Sequence[int], expected: Sequence[int]) -> None:
    """Raises unless the timed logits are those that the relay has chosen from."""
    if list(chosen) != list(expected):
        raise AssertionError(f"sampling: chosen tokens must be the relay's, got {chosen[:5]}...")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
