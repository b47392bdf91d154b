"""vLLM on its own attention and on ours, in turns; `make test-engines` makes the environment.

`python -m bench.vllm` loads both, and a third with `BATON_VLLM=invariant`, whose linear layers are
ours too; serves each workload once in float32 and compares the answers of the first two, token by
token; then measures. No figure is given where an answer differs. `--dtype bfloat16` measures in
bfloat16 after that comparison, which needs float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .evaluation.engines import ENGINES, ROOT, Engine, EngineProcess
from .evaluation.run import Job, Run, make_jobs
from .workloads import Request

CUSTOM = {"attention_backend": "CUSTOM"}
BACKENDS = {
    "vLLM's": ENGINES["vllm"],
    "ours": dataclasses.replace(ENGINES["vllm"], options=CUSTOM),
    "ours, batch-invariant": dataclasses.replace(
        ENGINES["vllm"], options=CUSTOM, variables={"BATON_VLLM": "invariant"}
    ),
}
# Requests, prompt tokens, output tokens. Of the second kind half are long prompts.
WORKLOADS = {
    "decode": [Request(0.0, 64 + 32 * (i % 4), 128) for i in range(16)],
    "mixed": [Request(0.0, (64, 512)[i % 2], (96, 16)[i % 2]) for i in range(16)],
}
COLUMNS = ("tokens/s", "ttft p50", "ttft p99", "tpot p50", "tpot p99")


def main(argv: Sequence[str] | None = None) -> int:
    """Compares, then measures and prints. 1 when answers differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.vllm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--backends", nargs="+", choices=tuple(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--slots", type=int, default=8, help="requests at a time; %(default)s")
    parser.add_argument("--turns", type=int, default=3, help="of each backend; %(default)s")
    arguments = parser.parse_args(argv)
    backends = {name: BACKENDS[name] for name in arguments.backends}
    with tempfile.TemporaryDirectory() as folder:
        make_entry_points(Path(folder))
        for name in arguments.workloads:
            jobs = make_jobs(WORKLOADS[name], range(100, 10_000))
            fault = compare(backends, jobs, arguments.slots)
            if fault is not None:
                print(f"{name}: {fault}; no figure is given", file=sys.stderr)
                return 1
            runs = measure(backends, jobs, arguments.dtype, arguments.slots, arguments.turns)
            print(f"\n{name}, {arguments.dtype}, {arguments.slots} slots\n")
            print(table(runs))
    return 0


def make_entry_points(folder: Path) -> None:
    """Puts our entry points where vLLM's processes find them, as an installed package has them."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "python", folder)))


def compare(backends: dict[str, Engine], jobs: Sequence[Job], slots: int) -> str | None:
    """What is wrong: a backend does not run, or answers of float32 differ; None if nothing is.

    The batch-invariant one sums in another order, so that a near tie may fall otherwise: its tokens
    are not compared here, but from batch to batch by the tests.
    """
    answers = {}
    for name, engine in backends.items():
        process = EngineProcess(engine, jobs, "float32", slots)
        try:
            attention, answers[name] = process.about["attention"], process.run().tokens
        finally:
            process.close()
        if (attention == ["baton_engines.vllm.backend"]) != bool(engine.options):
            return f"{name}: attention must not be {attention}"
    if {"ours", "vLLM's"} <= set(answers) and answers["ours"] != answers["vLLM's"]:
        return "answers differ"
    return None


def measure(
    backends: dict[str, Engine], jobs: Sequence[Job], dtype: str, slots: int, turns: int
) -> dict[str, list[Run]]:
    """Runs in turns, all engines loaded meanwhile."""
    processes: dict[str, EngineProcess] = {}
    try:
        for name, engine in backends.items():
            processes[name] = EngineProcess(engine, jobs, dtype, slots)
        runs: dict[str, list[Run]] = {name: [] for name in backends}
        for _ in range(turns):
            for name, process in processes.items():
                runs[name].append(process.run())
        return runs
    finally:
        for process in processes.values():
            process.close()


def table(runs: dict[str, list[Run]]) -> str:
    """Medians over the turns in Markdown: tokens per second, and milliseconds."""
    names = ("output_tokens_per_second", "ttft_p50", "ttft_p99", "time_per_token_p50",
             "time_per_token_p99")  # fmt: skip
    lines = [
        f"| attention | {' | '.join(COLUMNS)} | tokens/s, of vLLM's, turn by turn |",
        f"| --- |{' ---: |' * (len(COLUMNS) + 1)}",
    ]
    for backend, given in runs.items():
        medians = [statistics.median(run.figures[name] for run in given) for name in names]
        cells = [f"{medians[0]:.1f}", *(f"{1000 * value:.0f}" for value in medians[1:])]
        ratios = [
            run.figures[names[0]] / base.figures[names[0]]
            for run, base in zip(given, runs.get("vLLM's", ()), strict=False)
        ]
        cells.append(f"{statistics.median(ratios):.2f}" if ratios else "-")
        lines.append(f"| {backend} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
