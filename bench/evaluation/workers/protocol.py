"""The protocol between an engine's process and the benchmark; needs only the standard library.

The process is started with a JSON file: model folder, dtype, slots, threads, and the jobs, each a
list of token ids and a number of output tokens. It loads, warms up, and prints a line of JSON about
itself as soon as it is ready. For each line `[begin, end]` on its standard input it serves those
jobs once (all from `begin` on if `end` is null) and prints a line: the tokens of every job, when
each token was available, in seconds, and the engine's own figures.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Engines may print anything to standard output; the protocol's lines go to the original one.
_OUT = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


class Clocked:
    """Tokens of the jobs as they come, each with its time."""

    def __init__(self, count: int) -> None:
        self.begin = time.perf_counter()
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.times: list[list[float]] = [[] for _ in range(count)]
        self.figures: dict[str, float] = {}

    def add(self, index: int, tokens: list[int]) -> None:
        """Adds new tokens of a job, with the current time."""
        now = time.perf_counter() - self.begin
        self.tokens[index] += map(int, tokens)
        self.times[index] += [now] * len(tokens)


def serve(start: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[list], Clocked]]]):
    """Run the protocol.

    Args:
        start: takes the content of the JSON file; returns a description of the engine, and a
            function that serves jobs.
    """
    with open(sys.argv[1]) as file:
        work = json.load(file)
    about, run = start(work)
    # Enough tokens for every row to be busy at once.
    run([(ids, 4) for ids, _ in work["jobs"][: work["slots"]]])
    print(json.dumps(about), file=_OUT)
    for line in sys.stdin:
        begin, end = json.loads(line)
        result = run(work["jobs"][begin:end])
        seconds = time.perf_counter() - result.begin
        answer = {
            "tokens": result.tokens,
            "times": result.times,
            "seconds": seconds,
            "figures": result.figures,
        }
        print(json.dumps(answer), file=_OUT)
