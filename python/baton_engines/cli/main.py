"""The command `baton`: generate, invariance, info, demo.

Results go to standard output or a file, everything for human eyes to standard error. Torch and
transformers are imported when a command needs them, so that help and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ImportError as error:
    raise SystemExit(
        f"baton needs {error.name}, which the extra `engines` brings: "
        "pip install 'baton_kernels[engines]'"
    ) from error

from . import options
from .errors import CommandError, reported, show_tracebacks
from .inputs import check_output, gather_prompts, left_to_do, warn_of_unknown_fields
from .invariance import invariance
from .prompts_io import PromptRecord, demo_prompts
from .results_io import LineStream, ResultWriter, is_terminal, open_results

# Failed queries that are named on the console; the results have all of them.
_ERRORS_SHOWN = 5

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="BATON: queries leave and enter a running batch between two decode steps.",
)


@app.callback()
def _common(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error came from.")
    ] = False,
) -> None:
    show_tracebacks(traceback)


def load(model: str, dtype: options.Dtype, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer."""
    import torch

    from ..llama import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(model, dtype=dtype.value)


def _open_relay(
    model: Any,
    slots: int,
    capacity: int | None,
    policy: Any,
    *,
    prefill: str,
    prefill_threads: int | None,
    **settings: Any,
) -> Any:
    """The relay.

    Raises:
        CommandError: what stands against it.
    """
    from .. import prefill as prefills
    from ..relay import Relay

    threads = {} if prefill_threads is None else {"threads": prefill_threads}
    try:
        prefiller = prefills.get(prefill, **threads)
        return Relay(model, slots, capacity, policy, prefill=prefiller, **settings)
    # No Llama, or one with something that the patch does not know; a process that cannot start; no
    # package for the mode.
    except (ImportError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def _empty_generation_config(model: Any) -> Any:
    """One that only says when an answer ends, as the model's own does."""
    from transformers import GenerationConfig

    return GenerationConfig(eos_token_id=model.generation_config.eos_token_id)


def _run(
    relay: Any,
    records: Sequence[PromptRecord],
    tokenizer: Any,
    stream: LineStream,
    console: Console,
    *,
    name: str,
    quiet: bool,
    token_ids: bool,
    resume: bool,
    **submission: Any,
) -> tuple[Any, int | None]:
    """Answers the records, with progress on the console and results on the stream.

    Args:
        name: of the run, for the progress.
        token_ids: see `run_records`.
        resume: whether the rest is done another time: results are written as they come, and those
            of cancelled queries are not.
        submission: see `submit_records`.

    Returns:
        The Outcome, and the number of the signal that stopped the run, if one did.
    """
    from .generate import StopRequest, run_records, submit_records, was_cancelled
    from .report import ConsoleStream, RunProgress

    with (
        RunProgress(console, name, len(records), enabled=not quiet) as progress,
        StopRequest() as stopping,
    ):
        # On a terminal that shows both, results scroll by above the progress.
        shared = progress.console is not None and is_terminal(stream)
        writer = ResultWriter(
            ConsoleStream(progress.console) if shared else stream, in_order=not resume
        )

        def put(index: int, result: dict[str, Any]) -> None:
            if not (resume and was_cancelled(result)):
                writer.put(index, result)

        try:
            outcome = run_records(
                relay,
                records,
                submit_records(relay, records, tokenizer, **submission),
                on_result=put,
                on_step=lambda running, done, rate: progress.update(
                    running, done, rate, relay.num_slots
                ),
                stop=stopping,
                token_ids=token_ids,
            )
        except BaseException:
            # Whatever ended the run, answers that waited for earlier ones are not lost with it.
            with contextlib.suppress(OSError):
                writer.flush()
            raise
        writer.flush()
    return outcome, stopping.signal


def _report(
    console: Console, relay: Any, outcome: Any, *, title: str, quiet: bool, timeline: Path | None
) -> None:
    """What a run was like: its figures, the first of its errors, its picture."""
    if not quiet:
        from .report import summary_table

        console.print(summary_table({relay.policy.name: relay.summary()}))
    for line in outcome.errors[:_ERRORS_SHOWN]:
        console.print(f"[red]failed:[/] {escape(line)}", soft_wrap=True)
    if len(outcome.errors) > _ERRORS_SHOWN:
        more = len(outcome.errors) - _ERRORS_SHOWN
        console.print(f"[red]failed:[/] {more} more, see the results")
    if timeline is not None:
        from .timeline import draw_timeline, panel_of

        draw_timeline([panel_of(relay)], timeline, title=title)
        console.print(f"timeline: {timeline}", soft_wrap=True)


@app.command()
@reported
def generate(
    model: options.ModelOption = "smollm2",
    prompts: options.PromptsOption = None,
    prompt: options.PromptOption = None,
    output: options.OutputOption = None,
    resume: options.ResumeOption = False,
    slots: options.SlotsOption = 16,
    policy: options.PolicyOption = "baton",
    prefill: options.PrefillOption = "serial",
    prefill_threads: options.PrefillThreadsOption = None,
    admission: options.AdmissionOption = None,
    max_stall_tokens: options.MaxStallTokensOption = None,
    token_budget: options.TokenBudgetOption = None,
    bins: options.BinsOption = None,
    max_slots: options.MaxSlotsOption = None,
    kv_budget: options.KvBudgetOption = None,
    capacity: options.CapacityOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.ThreadsOption = None,
    max_new_tokens: options.MaxNewTokensOption = None,
    min_new_tokens: options.MinNewTokensOption = None,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    frequency_penalty: options.FrequencyPenaltyOption = None,
    presence_penalty: options.PresencePenaltyOption = None,
    generation_config: options.GenerationConfigOption = True,
    n: options.NOption = 1,
    logprobs: options.LogprobsOption = None,
    seed: options.SeedOption = 0,
    stop: options.StopOption = None,
    chat: options.ChatOption = True,
    token_ids: options.TokenIdsOption = False,
    timeline: options.TimelineOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Answer prompts; one JSON object per query, in the order of the prompts.

    A query that fails has an `error` in its place and does not stop the others; the exit code is
    then 1. Ctrl-C writes down what there is, and ends with 130. The file of results appears when
    the run is over; with `--resume` it grows line by line, and what it already holds is kept.
    """
    if prefill == "serial" and prefill_threads is not None:
        raise typer.BadParameter("--prefill-threads needs --prefill overlapped, apart or ray")
    made = options.make_policy(
        policy,
        admission=admission,
        max_stall_tokens=max_stall_tokens,
        token_budget=token_budget,
        bins=bins,
    )
    records = gather_prompts(prompts, prompt or [])
    check_output(output, prompts, resume)
    console = Console(stderr=True, highlight=False)
    warn_of_unknown_fields(console, records)
    # Of all records, so that a record has the same seed when a run is resumed.
    for index, record in enumerate(records):
        record.options.setdefault("seed", seed + index)
    if not records:
        console.print("no prompts")
        return
    if resume and output is not None:
        total, records = len(records), left_to_do(records, output)
        console.print(f"{total - len(records)} of {total} queries have results already")
        if not records:
            return
    with open_results(output, resume=resume) as stream:
        loaded, tokenizer = load(model, dtype, threads)
        relay = _open_relay(
            loaded,
            slots,
            capacity,
            made,
            prefill=prefill,
            prefill_threads=prefill_threads,
            tokenizer=tokenizer,
            generation_config=None if generation_config else _empty_generation_config(loaded),
            max_slots=max_slots,
            kv_budget=None if kv_budget is None else int(kv_budget * 2**20),
        )
        defaults = {
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "frequency_penalty": frequency_penalty,
            "presence_penalty": presence_penalty,
            "n": n,
            "logprobs": logprobs,
            "stop": tuple(stop) if stop else None,
        }
        with relay:
            outcome, stopped_by = _run(
                relay,
                records,
                tokenizer,
                stream,
                console,
                name=policy,
                quiet=quiet,
                token_ids=token_ids,
                resume=resume,
                defaults=defaults,
                chat=chat,
            )
    title = f"{len(records)} queries, {slots} slots, {model}"
    _report(console, relay, outcome, title=title, quiet=quiet, timeline=timeline)
    if stopped_by is not None:
        console.print(f"stopped: {outcome.cancelled} queries were cancelled")
        raise typer.Exit(128 + stopped_by)
    if outcome.failed:
        raise typer.Exit(1)


app.command()(reported(invariance))


@app.command()
@reported
def info(
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Versions, instruction sets, and which op runs where, or why it does not."""
    import importlib.metadata

    import baton_kernels

    details = baton_kernels.build_info()
    packages = {}
    for package in ("transformers", "tokenizers", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[package] = importlib.metadata.version(package)
    if as_json:
        typer.echo(json.dumps({**details, "packages": packages}, indent=2, default=str))
        return
    from .report import info_tables

    console = Console(highlight=False)
    for part in info_tables(details, packages):
        console.print(part)


@app.command()
@reported
def demo(
    model: options.ModelOption = "smollm2",
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the picture and the answers; made if missing.")
    ] = Path("demo"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file; the 48 prompts of the package when left out.")
    ] = None,
    slots: options.SlotsOption = 16,
    capacity: options.CapacityOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.ThreadsOption = None,
) -> None:
    """The same prompts by run_to_completion and by baton, in turns: answers, counts, figures."""
    records = gather_prompts(prompts, []) if prompts is not None else demo_prompts()
    if not records:
        raise CommandError(f"{prompts} has no prompts")
    console = Console(highlight=False)
    from .demo import introduction, run_demo

    console.print(introduction(len(records), slots))

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"cannot make {output_dir}: {error.strerror or error}") from error
    # No spinner: fetching a model draws its own progress.
    console.print(f"loading {escape(model)}")
    loaded, tokenizer = load(model, dtype, threads)
    try:
        same = run_demo(
            loaded,
            tokenizer,
            records,
            name=model,
            output_dir=output_dir,
            slots=slots,
            capacity=capacity,
            console=console,
        )
    except NotImplementedError as error:
        raise CommandError(str(error)) from error
    raise typer.Exit(0 if same else 1)


def main() -> None:
    """Entry point of the console script."""
    # The kernels have their own threads. Those of torch's operators, of which a step calls a few,
    # would spin for milliseconds on the kernels' cores. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
