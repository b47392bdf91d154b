"""Savings of a prefix cache: conversations with one system prompt, with and without it, in turns.

Lengths and order are those of the Azure conversation trace, all submitted at once; every prompt
begins with the same system prompt. The answers of all runs must have the same tokens.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from baton_engines import Relay, load_model
from bench import describe_run, spread
from bench.workloads import Request, at_once, azure

MIB = 2**20


@dataclass(frozen=True)
class Run:
    """One run of all queries.

    Attributes:
        tokens: of every answer.
        computed, reused: prompt tokens.
        seconds: until the last answer.
        first_token: median seconds to the first token.
        peak_bytes: keys and values in the prefix cache at the end.
    """

    tokens: list[list[int]]
    computed: int
    reused: int
    seconds: float
    first_token: float
    peak_bytes: int


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--divisor", type=float, default=8.0, help="of the trace's lengths")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prefix-cache", type=int, default=256, help="MiB")
    parser.add_argument("--answers", type=int, default=1, help="per prompt (n)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    model, _ = load_model(arguments.model, dtype=arguments.dtype)
    requests = at_once(azure("conv", arguments.queries, divisor=arguments.divisor))
    prompts = make_prompts(requests, arguments.system_tokens, model.config.vocab_size)
    print(describe_run())
    longest = max(len(p) + r.output_tokens for p, r in zip(prompts, requests, strict=True))
    print(
        f"{arguments.queries} conversations of {sum(map(len, prompts))} prompt tokens, "
        f"{arguments.system_tokens} of them a shared system prompt; {arguments.answers} answer(s) "
        f"each, {arguments.slots} slots, {arguments.dtype}"
    )
    runs: dict[str, list[Run]] = {"without": [], "with": []}
    for _ in range(arguments.repeats):
        for name, cache in (("without", None), ("with", arguments.prefix_cache * MIB)):
            with Relay(
                model, arguments.slots, longest, generation_config=None, prefix_cache=cache
            ) as relay:
                runs[name].append(serve(relay, prompts, requests, arguments.answers))
    reference = runs["without"][0].tokens
    if any(run.tokens != reference for group in runs.values() for run in group):
        raise SystemExit("the answers differ: nothing is reported")
    for name, group in runs.items():
        report(name, group)
    ratio = [a.seconds / b.seconds for a, b in zip(runs["without"], runs["with"], strict=True)]
    print(f"all answers equal; with it {spread(ratio, '{:.2f}')} times the tokens per second")


def make_prompts(requests: list[Request], system_tokens: int, vocab: int) -> list[list[int]]:
    """Prompts of random tokens after the same system prompt."""
    generator = random.Random(0)
    system = [generator.randrange(vocab) for _ in range(system_tokens)]
    return [
        system + [generator.randrange(vocab) for _ in range(request.prompt_tokens)]
        for request in requests
    ]


def serve(relay: Any, prompts: list[list[int]], requests: list[Request], answers: int) -> Run:
    """Answers all prompts."""
    begin = time.perf_counter()
    queries = []
    for prompt, request in zip(prompts, requests, strict=True):
        options = {"max_new_tokens": request.output_tokens, "eos": None}
        if answers > 1:
            queries += relay.submit_n(prompt, answers, temperature=1.0, seed=0, **options)
        else:
            queries.append(relay.submit(prompt, **options))
    relay.run()
    seconds = time.perf_counter() - begin
    return Run(
        [query.result() for query in queries],
        relay.counters.prompt_tokens,
        relay.counters.reused_tokens,
        seconds,
        statistics.median(query.first_token - query.submitted for query in queries),
        relay.prefix_bytes,
    )


def report(name: str, runs: list[Run]) -> None:
    """Prints one line for a kind of run."""
    tokens = sum(map(len, runs[0].tokens))
    run = runs[0]
    share = run.reused / (run.reused + run.computed)
    print(
        f"{name:8} {share:6.1%} of the prompts' tokens not computed, "
        f"{spread([tokens / r.seconds for r in runs], '{:.1f}')} output tokens/s, "
        f"first token after {spread([r.first_token for r in runs], '{:.2f}')} s, "
        f"{run.peak_bytes / MIB:.0f} MiB kept"
    )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
