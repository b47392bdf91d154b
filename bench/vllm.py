"""vLLM on its own attention and on ours, in turns; `make test-engines` makes the environment.

`python -m bench.vllm` starts vLLM three times, side by side and once for all workloads: on its own
attention, on ours, and with `BATON_VLLM=invariant`, whose linear layers are ours too. They serve
the same requests in turns, through vLLM's engine. In float32 the answers of the first two are
compared token by token, and no figure is given where one differs; `--dtype bfloat16` measures after
such a comparison in float32. `--quick` is for a first look.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .evaluation.engines import ENGINES, ROOT, Engine, EngineProcess
from .evaluation.run import Job, Run, make_jobs
from .workloads import Request, at_once, azure, orca

THEIRS, OURS, INVARIANT = "vLLM's", "ours", "ours, batch-invariant"
_CACHING = {"enable_prefix_caching": True}
_CUSTOM = {**_CACHING, "attention_backend": "CUSTOM"}
BACKENDS = {
    THEIRS: dataclasses.replace(ENGINES["vllm"], options=_CACHING),
    OURS: dataclasses.replace(ENGINES["vllm"], options=_CUSTOM),
    INVARIANT: dataclasses.replace(
        ENGINES["vllm"], options=_CUSTOM, variables={"BATON_VLLM": "invariant"}
    ),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """The requests of each turn, submitted all at once.

    Attributes:
        requests: prompt and output lengths.
        cached: whether every turn has the same prompts, which the prefix cache holds after a first
            turn that does not count; otherwise no two turns share one.
        least: the goal for tokens/s, as a share of vLLM's.
    """

    requests: list[Request]
    cached: bool = False
    least: float = 0.97


WORKLOADS = {
    "decode": Workload([Request(0.0, 64 + 32 * (i % 4), 128) for i in range(16)], least=1.3),
    # A page has 128 tokens: all of a prompt but the last ones comes from the cache.
    "decode, long": Workload([Request(0.0, 1540, 64) for _ in range(8)], cached=True, least=1.3),
    # Half are long prompts with short answers.
    "mixed": Workload([Request(0.0, (64, 512)[i % 2], (96, 16)[i % 2]) for i in range(16)]),
    # The evaluation's: Orca's lengths, and conversations of the Azure trace at half their lengths,
    # whose prompts are in the cache.
    "orca": Workload(orca(16)),
    "conversations": Workload(at_once(azure("conv", 8, divisor=2)), cached=True, least=1.3),
}
FIGURES = {
    "tokens/s": "output_tokens_per_second",
    "ttft p50": "ttft_p50",
    "ttft p99": "ttft_p99",
    "tpot p50": "time_per_token_p50",
    "tpot p99": "time_per_token_p99",
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """A part of the jobs, which every engine serves before the next turn."""

    workload: str
    begin: int
    end: int
    counts: bool = True


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, compares and prints. 1 when answers differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--slots", type=int, default=8, help="requests at a time; %(default)s")
    parser.add_argument("--turns", type=int, help="of each backend; default: 3, 1 with --quick")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter answers")
    arguments = parser.parse_args(argv)
    backends = {name: BACKENDS[name] for name in arguments.backends}
    chosen = {name: WORKLOADS[name] for name in arguments.workloads}
    if arguments.quick:
        chosen = {name: shortened(workload) for name, workload in chosen.items()}
    turns = 1 if arguments.quick else 3
    turns = turns if arguments.turns is None else arguments.turns
    with tempfile.TemporaryDirectory() as folder:
        make_entry_points(Path(folder))
        if arguments.dtype != "float32":
            # Its rounding turns near ties.
            compared = {name: backends[name] for name in backends if name != INVARIANT}
            jobs, plan = make_plan(chosen, 1)
            with started(compared, jobs, "float32", arguments.slots) as processes:
                fault = differences(serve(processes, plan))
            if fault is not None:
                print(f"{fault}; no figure is given", file=sys.stderr)
                return 1
        jobs, plan = make_plan(chosen, turns)
        with started(backends, jobs, arguments.dtype, arguments.slots) as processes:
            runs = serve(processes, plan)
    fault = differences(runs)
    if fault is not None and arguments.dtype == "float32":
        print(f"{fault}; no figure is given", file=sys.stderr)
        return 1
    for name, workload in chosen.items():
        given = {
            backend: [run for turn, run in served if turn.workload == name and turn.counts]
            for backend, served in runs.items()
        }
        print(f"\n{name}, {arguments.dtype}, {arguments.slots} slots\n")
        print(table(given))
        print("\n" + "\n".join(verdicts(given, workload.least)), flush=True)
    return 0


def shortened(workload: Workload) -> Workload:
    """A fraction of it, for a first look."""
    requests = [
        dataclasses.replace(request, output_tokens=request.output_tokens // 4)
        for request in workload.requests[:8]
    ]
    return dataclasses.replace(workload, requests=requests)


def make_plan(workloads: dict[str, Workload], turns: int) -> tuple[list[Job], list[Turn]]:
    """All jobs, and which of them each turn serves."""
    requests: list[Request] = []
    plan: list[Turn] = []
    for name, workload in workloads.items():
        for turn in range(turns + workload.cached):
            if not (workload.cached and turn):
                begin = len(requests)
                requests += workload.requests
            # The first one fills the cache.
            counts = not workload.cached or turn > 0
            plan.append(Turn(name, begin, len(requests), counts))
    return make_jobs(requests, range(100, 20_000)), plan


def make_entry_points(folder: Path) -> None:
    """Puts our entry points where vLLM's processes find them, as an installed package has them."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", folder)))


@contextlib.contextmanager
def started(
    backends: dict[str, Engine], jobs: Sequence[Job], dtype: str, slots: int
) -> Iterator[dict[str, EngineProcess]]:
    """The engines, loaded side by side; a start is mostly one thread's work.

    Raises:
        RuntimeError: one does not start, or has the attention that it should not.
    """
    begin = time.perf_counter()
    with ThreadPoolExecutor(len(backends)) as pool:
        futures = {
            name: pool.submit(EngineProcess, engine, jobs, dtype, slots)
            for name, engine in backends.items()
        }
    try:
        processes = {name: future.result() for name, future in futures.items()}
        for name, process in processes.items():
            attention = process.about["attention"]
            if (attention == ["baton_engines.vllm.backend"]) != (name != THEIRS):
                raise RuntimeError(f"bench.vllm: attention of {name} must not be {attention}")
        print(f"{dtype}: loaded in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        yield processes
    finally:
        for future in futures.values():
            if future.exception() is None:
                future.result().close()


def serve(
    processes: dict[str, EngineProcess], plan: Sequence[Turn]
) -> dict[str, list[tuple[Turn, Run]]]:
    """The turns in order, each by every engine."""
    runs: dict[str, list[tuple[Turn, Run]]] = {name: [] for name in processes}
    for turn in plan:
        for name, process in processes.items():
            run = process.run(turn.begin, turn.end)
            runs[name].append((turn, run))
            print(f"{turn.workload}: {name}: {run.figures['seconds']:.1f} s", file=sys.stderr)
    return runs


def differences(runs: dict[str, list[tuple[Turn, Run]]]) -> str | None:
    """Where answers on our attention and on vLLM's differ; None if they do nowhere.

    The batch-invariant one sums in another order, so that a near tie may fall otherwise: its tokens
    are not compared here, but from batch to batch by the tests.
    """
    pairs = zip(runs.get(OURS, ()), runs.get(THEIRS, ()), strict=False)
    for (turn, ours), (_, theirs) in pairs:
        differ = sum(a != b for a, b in zip(ours.tokens, theirs.tokens, strict=True))
        if differ:
            return f"{turn.workload}: {differ} of {len(ours.tokens)} answers differ"
    return None


def table(runs: dict[str, list[Run]]) -> str:
    """Medians over the turns in Markdown: tokens per second, and milliseconds. The last column is
    the median of the ratios, turn by turn."""
    lines = [
        f"| attention | {' | '.join(FIGURES)} | time in attention | tokens/s, of vLLM's |",
        f"| --- |{' ---: |' * (len(FIGURES) + 2)}",
    ]
    for backend, given in runs.items():
        medians = [
            statistics.median(run.figures[name] for run in given) for name in FIGURES.values()
        ]
        cells = [f"{medians[0]:.1f}", *(f"{1000 * value:.0f}" for value in medians[1:])]
        cells.append(f"{100 * attention_share(given):.1f} %")
        share = ratio(runs, backend, THEIRS)
        cells.append("-" if share is None else f"{share:.2f}")
        lines.append(f"| {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(runs: dict[str, list[Run]], least: float) -> list[str]:
    """Says for each goal whether the figures reach it."""
    lines = []
    share = ratio(runs, OURS, THEIRS)
    if share is not None:
        met = "met" if share >= least else "missed"
        lines.append(f"Ours: {share:.2f} of vLLM's tokens/s; goal >= {least}: {met}.")
        rest = 1 - attention_share(runs[THEIRS])
        lines.append(f"Attention that takes no time would make it {1 / rest:.2f}.")
    share = ratio(runs, INVARIANT, OURS)
    if share is not None:
        cost = 100 * (1 - share)
        met = "met" if cost <= 3 else "missed"
        lines.append(f"Batch invariance costs {cost:.1f} % of ours; goal <= 3 %: {met}.")
    return lines


def attention_share(given: list[Run]) -> float:
    """Median over the turns of the part of the time that attention takes."""
    return statistics.median(
        run.figures["attention_seconds"] / run.figures["seconds"] for run in given
    )


def ratio(runs: dict[str, list[Run]], backend: str, base: str) -> float | None:
    """Median over the turns of tokens/s in terms of another backend's; None without one."""
    name = FIGURES["tokens/s"]
    ratios = [
        run.figures[name] / other.figures[name]
        for run, other in zip(runs.get(backend, ()), runs.get(base, ()), strict=False)
    ]
    return statistics.median(ratios) if ratios else None


if __name__ == "__main__":
    sys.exit(main())
