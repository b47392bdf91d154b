"""Where the time of a decode step goes: the ops, what they lose to cold caches and sleeping
threads, torch and Python around them, and the relay; compared with the machine's limit.

A relay decodes with every row busy. Each op is timed in place. In every other step it runs three
times in a row and the fastest counts: that is its time with its weights in the caches, as far as
they fit, and with all threads awake.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import baton_kernels
from baton_engines import Relay, llama, load_model, patch_llama

from . import describe_run
from .evaluation.limit import Ceiling, Sizes, measure_ceiling, work_seconds
from .workloads import Request

BAR = 60
AROUND, RELAY = "torch and Python in the forward", "the relay: plan, rows, choice of tokens"


@dataclass(frozen=True)
class Part:
    """A part of a step's time.

    Attributes:
        name: of an op, or of another part.
        calls: per step.
        seconds: per step.
        hot: the same when repeated at once; None for what is not an op.
    """

    name: str
    calls: int
    seconds: float
    hot: float | None = None


class TimedOps:
    """The ops of `baton_kernels`, timed; everything else in it is unchanged.

    Attributes:
        hot: whether each call is repeated, and the fastest counted.
        times: seconds by op since the last `clear`, one per call.
    """

    def __init__(self) -> None:
        self.hot = False
        self.times: dict[str, list[float]] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(baton_kernels, name)
        if isinstance(function, type) or not callable(function):
            return function

        def timed(*args: Any, **kwargs: Any) -> Any:
            seconds = []
            for _ in range(3 if self.hot else 1):
                # An op overwrites only what it wrote before, if anything, so it may run again.
                begin = time.perf_counter()
                result = function(*args, **kwargs)
                seconds.append(time.perf_counter() - begin)
            self.times.setdefault(name, []).append(min(seconds))
            return result

        return timed


@contextlib.contextmanager
def timed_ops() -> Iterator[TimedOps]:
    """Within the block, the patched forward calls timed ops."""
    ops, before = TimedOps(), llama.forward.kernels
    llama.forward.kernels = ops
    try:
        yield ops
    finally:
        llama.forward.kernels = before


def measure_step(patched: Any, rows: int, columns: int, steps: int) -> tuple[float, list[Part]]:
    """Seconds of the median decode step and of its parts; the parts add up to the step.

    Args:
        patched: a `PatchedLlama`.
        rows: queries that decode.
        columns: tokens of each, when the first of the steps begins.
        steps: number of steps timed in place, and the same number again with every op repeated.
    """
    # The two kinds of steps take turns; the first ones are not counted.
    total = 2 * steps + 4
    with timed_ops() as ops, Relay(patched, rows, columns + total + 2) as relay:
        generator = torch.Generator().manual_seed(0)
        for _ in range(rows):
            ids = torch.randint(patched.vocab_size, (columns,), generator=generator)
            relay.submit(ids, max_new_tokens=total + 2, eos=None)
        while relay.waiting or any(query.prompt_left for query in relay.running):
            relay.step()
        forward = patched.forward
        forwards: list[float] = []
        patched.forward = _timed(forward, forwards)
        whole, inside, found = [], [], []
        hot: list[dict[str, list[float]]] = []
        try:
            for index in range(total):
                ops.hot = index % 2 == 1
                ops.times, before = {}, time.perf_counter()
                relay.step()
                seconds = time.perf_counter() - before
                if index < 4:
                    continue
                if ops.hot:
                    hot.append(ops.times)
                else:
                    whole.append(seconds)
                    inside.append(forwards[-1])
                    found.append(ops.times)
        finally:
            del patched.forward
    # The median step, so that the parts belong to one step and add up.
    middle = sorted(range(len(whole)), key=whole.__getitem__)[len(whole) // 2]
    parts = [
        Part(
            name,
            len(times),
            sum(times),
            statistics.median(sum(one[name]) for one in hot),
        )
        for name, times in found[middle].items()
    ]
    parts.sort(key=lambda part: -part.seconds)
    ops_seconds = sum(part.seconds for part in parts)
    parts.append(Part(AROUND, 1, inside[middle] - ops_seconds))
    parts.append(Part(RELAY, 1, whole[middle] - inside[middle]))
    return whole[middle], parts


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - begin)
        return result

    return timed


def limit_of_step(sizes: Sizes, ceiling: Ceiling, rows: int, columns: int) -> float:
    """Seconds of the step if nothing is idle, as computed by `bench.evaluation.limit`."""
    with_step = [Request(0.0, columns, 2)] * rows
    without = [Request(0.0, columns, 1)] * rows
    prompts = work_seconds(without, sizes, ceiling, rows, steps=1)
    # Without an answer there is no step; both times contain one reading of the weights.
    reading = sizes.weight_bytes / ceiling.read_bytes
    return work_seconds(with_step, sizes, ceiling, rows, steps=1) - prompts + reading


def report(step: float, parts: Sequence[Part], limit: float) -> str:
    """A table and a bar of the parts, and the limit."""
    lines = [f"{'':<44}{'calls':>7}{'ms':>9}{'share':>8}{'hot ms':>9}{'lost ms':>9}"]
    for part in parts:
        line = (
            f"{part.name:<44}{part.calls:>7}{1e3 * part.seconds:>9.3f}{part.seconds / step:>8.1%}"
        )
        if part.hot is not None:
            line += f"{1e3 * part.hot:>9.3f}{1e3 * (part.seconds - part.hot):>9.3f}"
        lines.append(line)
    hot = sum(part.hot for part in parts if part.hot is not None)
    lines.append(f"{'step':<44}{'':>7}{1e3 * step:>9.3f}{1:>8.1%}{1e3 * hot:>9.3f}")
    share = f"{1e3 * limit:.3f} ms, {limit / step:.0%}"
    lines.append(f"{step / hot:.2f} x its ops timed hot; the limit is {share}")
    return "\n".join([*lines, bar(step, parts, limit)])


def bar(step: float, parts: Sequence[Part], limit: float) -> str:
    """One letter per sixtieth of the step, and a second line as long as the limit."""
    letters, total = "", 0.0
    for index, part in enumerate(parts):
        total += part.seconds
        letters += chr(ord("a") + index) * (round(BAR * total / step) - len(letters))
    names = ", ".join(f"{chr(ord('a') + i)} {part.name}" for i, part in enumerate(parts))
    return f"step  {letters}\nlimit {'#' * round(BAR * limit / step)}\n{names}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", choices=("int8",), help="round the weights to it")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--columns", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args(argv)
    model, _ = load_model(arguments.model, dtype=arguments.dtype)
    dtype = getattr(torch, arguments.dtype)
    sizes, ceiling = Sizes.of(model.config, dtype), measure_ceiling(dtype)
    # The limit for the model's dtype.
    weights = f", weights in {arguments.weights}" if arguments.weights else ""
    print(
        f"{arguments.model} in {arguments.dtype}{weights}, rows of {arguments.columns} columns; "
        f"ceilings {ceiling.flops / 1e9:.0f} GFLOP/s, {ceiling.read_bytes / 1e9:.1f} GB/s\n"
        f"{describe_run()}"
    )
    with patch_llama(model, weight_dtype=arguments.weights) as patched:
        for rows in arguments.rows:
            step, parts = measure_step(patched, rows, arguments.columns, arguments.steps)
            limit = limit_of_step(sizes, ceiling, rows, arguments.columns)
            print(f"\n{rows} rows\n{report(step, parts, limit)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
