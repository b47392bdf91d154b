"""The relay against `model.generate` in static batches: `python -m bench.relay --vs-generate`.

The same prompts go through the relay and through transformers' generate in left-padded batches
(sdpa), in turns on one model in one process. Answers are compared token by token before a figure is
printed; in float32 a difference ends the benchmark.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from baton_engines.cli.prompts_io import demo_prompts, read_prompt_file
from baton_engines.llama import patch_llama
from baton_engines.llama.load import load_model
from baton_engines.relay import Relay

from . import describe_run, spread


@dataclass(frozen=True)
class Job:
    """One prompt and the most tokens of its answer."""

    token_ids: list[int]
    max_new_tokens: int


def read_jobs(tokenizer: Any, prompts: Path | None = None) -> list[Job]:
    """The prompts of a file, or of the package, as tokens."""
    records = demo_prompts() if prompts is None else read_prompt_file(prompts)
    errors = [record.error for record in records if record.error]
    if errors:
        raise SystemExit(f"{prompts}: {errors[0]}")
    return [
        Job(record.encode(tokenizer), record.options.get("max_new_tokens", 128))
        for record in records
    ]


def run_relay(patched: Any, jobs: Sequence[Job], slots: int) -> list[list[int]]:
    """Greedy answers of all jobs through a relay of that many slots."""
    with Relay(patched, slots) as relay:
        queries = [relay.submit(job.token_ids, max_new_tokens=job.max_new_tokens) for job in jobs]
        relay.run()
        return [list(query.result()) for query in queries]


class RowLimits(StoppingCriteria):
    """Ends each row of a batch at its own length; generate then stops with the last of them."""

    def __init__(self, limits: torch.Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self.limits


@torch.inference_mode()
def run_generate(model: Any, jobs: Sequence[Job], batch_size: int) -> list[list[int]]:
    """Greedy answers of all jobs, batch after batch in their order, left-padded."""
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos])
    pad_id = min(id for id in eos_ids if id is not None) if eos_ids != {None} else 0
    answers = []
    for first in range(0, len(jobs), batch_size):
        batch = jobs[first : first + batch_size]
        width = max(len(job.token_ids) for job in batch)
        ids = torch.full((len(batch), width), pad_id)
        mask = torch.zeros_like(ids)
        for row, job in enumerate(batch):
            ids[row, width - len(job.token_ids) :] = torch.tensor(job.token_ids)
            mask[row, width - len(job.token_ids) :] = 1
        limits = torch.tensor([job.max_new_tokens for job in batch])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=int(limits.max()),
            do_sample=False,
            pad_token_id=pad_id,
            stopping_criteria=StoppingCriteriaList([RowLimits(width + limits)]),
        )
        for job, row in zip(batch, out[:, width:].tolist(), strict=True):
            answer = row[: job.max_new_tokens]
            ends = [i for i, token in enumerate(answer) if token in eos_ids]
            answers.append(answer[: ends[0] + 1] if ends else answer)
    return answers


@dataclass
class Comparison:
    """Output tokens/s of both sides, one pair per repeat, and how far their answers agree."""

    relay_rates: list[float]
    generate_rates: list[float]
    equal_queries: int
    num_queries: int
    equal_tokens: float

    @property
    def ratios(self) -> list[float]:
        """Relay over generate, repeat by repeat."""
        return [a / b for a, b in zip(self.relay_rates, self.generate_rates, strict=True)]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens from the beginning are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def compare(
    model: Any,
    jobs: Sequence[Job],
    *,
    slots: int,
    repeats: int,
    report: Callable[[str], object] = print,
) -> Comparison:
    """Times relay and generate in turns, after a warm-up of both.

    Args:
        model: LlamaForCausalLM with sdpa attention; patched only while the relay runs.
        jobs: prompts.
        slots: rows of the relay and of generate's batches.
        repeats: pairs of runs.
        report: called with a line per pair.
    """
    warm_up = [Job(job.token_ids, 2) for job in jobs[:slots]]
    with patch_llama(model) as patched:
        run_relay(patched, warm_up, slots)
    run_generate(model, warm_up, slots)
    result = Comparison([], [], 0, len(jobs), 0.0)
    for repeat in range(repeats):
        # The patch merges weights once per model, not once per run: it is outside the time.
        with patch_llama(model) as patched:
            begin = time.perf_counter()
            ours = run_relay(patched, jobs, slots)
            result.relay_rates.append(sum(map(len, ours)) / (time.perf_counter() - begin))
        begin = time.perf_counter()
        theirs = run_generate(model, jobs, slots)
        result.generate_rates.append(sum(map(len, theirs)) / (time.perf_counter() - begin))
        report(
            f"{repeat + 1:>6}  {result.relay_rates[-1]:>10.1f}  {result.generate_rates[-1]:>13.1f}"
            f"  {result.ratios[-1]:>6.2f}"
        )
    result.equal_queries = sum(a == b for a, b in zip(ours, theirs, strict=True))
    agreeing = sum(common_prefix(a, b) for a, b in zip(ours, theirs, strict=True))
    result.equal_tokens = agreeing / max(1, sum(map(len, theirs)))
    return result


def vs_generate(arguments: argparse.Namespace) -> int:
    """Prints the comparison; 1 when float32 answers differ."""
    model, tokenizer = load_model(arguments.model, dtype=arguments.dtype)
    model.set_attn_implementation("sdpa")
    jobs = read_jobs(tokenizer, arguments.prompts)
    limits = [job.max_new_tokens for job in jobs]
    print(
        f"relay against transformers' generate: {arguments.model} in {arguments.dtype}, "
        f"{len(jobs)} queries, answers of {min(limits)} to {max(limits)} tokens, greedy\n"
        f"relay of {arguments.slots} slots (baton); generate in left-padded batches of "
        f"{arguments.slots}, sdpa\n{describe_run()}\n"
    )
    print("repeat  relay tok/s  generate tok/s   ratio")
    result = compare(model, jobs, slots=arguments.slots, repeats=arguments.repeats)
    print(
        f"\nanswers: {result.equal_queries} of {result.num_queries} queries equal token by token, "
        f"{result.equal_tokens:.1%} of the tokens before the first difference"
    )
    if arguments.dtype == "float32" and result.equal_queries < result.num_queries:
        print("float32 answers must be equal: no figure is given")
        return 1
    if result.equal_queries < result.num_queries:
        print("(each side rounds in its own order; one near tie and two greedy answers part)")
    print(f"relay    output tokens/s, median (p10-p90): {spread(result.relay_rates, '{:.1f}')}")
    print(f"generate output tokens/s, median (p10-p90): {spread(result.generate_rates, '{:.1f}')}")
    print(f"ratio relay / generate,   median (p10-p90): {spread(result.ratios)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.relay --vs-generate", description=__doc__
    )
    parser.add_argument("--vs-generate", action="store_true", required=True, help="this benchmark")
    add_arguments(parser)
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs")
    arguments = parser.parse_args(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return vs_generate(arguments)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which model serves which prompts."""
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a hub id")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--slots", type=int, default=16, help="slots, and rows of a static batch")
    parser.add_argument("--prompts", type=Path, help="JSONL; the package's 48 when left out")
    parser.add_argument("--threads", type=int, help="CPU threads")
