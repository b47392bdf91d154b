"""The relay's peak memory, taken apart: `python -m bench.relay --memory`.

Runs 48 and then 480 short queries, each in a process of its own, and takes the peak apart: process
and weights, cache, and the rest, which is the workspace.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baton_engines.llama import patch_llama
from baton_engines.llama.load import load_model
from baton_engines.relay import Relay

from . import describe_run
from .vs_generate import Job, add_arguments, read_jobs

MIB = 1 << 20
MEMORY_QUERIES = (48, 480)
MEMORY_NEW_TOKENS = 16
MEMORY_PROMPT_TOKENS = 64
# What the allocator keeps for later differs from run to run by a few MiB.
MEMORY_TOLERANCE = 16 * MIB


@dataclass
class MemoryCase:
    """Peak memory of one run in bytes, taken apart."""

    num_queries: int
    output_tokens: int
    weights: int
    process: int
    cache_in_use: int
    cache_committed: int
    workspace: int
    peak: int


def status_bytes(field: str) -> int:
    """A size of this process out of /proc/self/status, such as VmRSS or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory(model: Any, jobs: Sequence[Job], slots: int) -> MemoryCase:
    """Runs the jobs and takes apart the peak of resident memory. Linux only.

    What the process held before the run is process + weights. The peak above that is cache and
    workspace, the first run's thread pools and lazily loaded libraries included.
    """
    parameters = {p.data_ptr(): p for p in model.parameters()}
    weights = sum(p.numel() * p.element_size() for p in parameters.values())
    with patch_llama(model) as patched, Relay(patched, slots) as relay:
        # A mapped weight file is resident only once it has been read.
        for parameter in parameters.values():
            parameter.sum()
        gc.collect()
        # What loading left free in the allocator would otherwise hide what the run takes.
        ctypes.CDLL(None).malloc_trim(0)
        before = status_bytes("VmRSS")
        # "5" sets the peak (VmHWM) back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        in_use = committed = 0
        for job in jobs:
            relay.submit(job.token_ids, max_new_tokens=job.max_new_tokens)
        while relay.step():
            in_use = max(in_use, relay.cache.bytes_in_use)
            committed = max(committed, relay.cache.bytes_committed)
        peak = status_bytes("VmHWM")
        output_tokens = relay.counters.output_tokens
    return MemoryCase(
        num_queries=len(jobs),
        output_tokens=output_tokens,
        weights=weights,
        process=before - weights,
        cache_in_use=in_use,
        cache_committed=committed,
        workspace=peak - before - committed,
        peak=peak,
    )


def short_jobs(jobs: Sequence[Job], count: int) -> list[Job]:
    """`count` short queries made of the short ones among `jobs`, over and over."""
    short = [job for job in jobs if len(job.token_ids) <= MEMORY_PROMPT_TOKENS] or list(jobs)
    return [Job(short[i % len(short)].token_ids, MEMORY_NEW_TOKENS) for i in range(count)]


def memory_case(arguments: argparse.Namespace) -> int:
    """The child process of one case: prints it as JSON."""
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    jobs = short_jobs(read_jobs(tokenizer, arguments.prompts), arguments.memory_case)
    print(json.dumps(asdict(measure_memory(model, jobs, arguments.slots))))
    return 0


def memory(arguments: argparse.Namespace) -> int:
    """Prints the cases side by side; 1 when the workspace grows with the number of queries."""
    print(
        f"peak memory of a relay: {arguments.model} in {arguments.dtype}, {arguments.slots} slots, "
        f"short queries ({MEMORY_NEW_TOKENS} new tokens)\n{describe_run()}\n"
    )
    cases = []
    for count in MEMORY_QUERIES:
        command = [sys.executable, "-m", "bench.relay", "--memory-case", str(count)]
        for name in ("model", "dtype", "slots", "prompts", "threads"):
            if getattr(arguments, name) is not None:
                command += [f"--{name}", str(getattr(arguments, name))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        cases.append(MemoryCase(**json.loads(done.stdout.splitlines()[-1])))
    rows = (
        ("queries served", "num_queries", 1),
        ("output tokens", "output_tokens", 1),
        ("python, torch, libraries (MiB)", "process", MIB),
        ("weights (MiB)", "weights", MIB),
        ("cache, committed pages (MiB)", "cache_committed", MIB),
        ("  of which valid at most (MiB)", "cache_in_use", MIB),
        ("workspace (MiB)", "workspace", MIB),
        ("peak (MiB)", "peak", MIB),
    )
    for label, field, unit in rows:
        values = [getattr(case, field) / unit for case in cases]
        cells = "".join(f"{value:>12,.{0 if unit == 1 else 1}f}" for value in values)
        print(f"{label:<36}{cells}")
    first, last = cases[0], cases[-1]
    grown = last.workspace - first.workspace
    constant = grown <= MEMORY_TOLERANCE
    print(
        f"\n{last.num_queries / first.num_queries:.0f}x as many queries: workspace "
        f"{grown / MIB:+.1f} MiB, {'constant' if constant else 'GROWS'} within "
        f"{MEMORY_TOLERANCE / MIB:.0f} MiB"
    )
    return 0 if constant else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m bench.relay --memory", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--memory", action="store_true", help="this benchmark")
    what.add_argument("--memory-case", type=int, help=argparse.SUPPRESS)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return memory(arguments) if arguments.memory else memory_case(arguments)
