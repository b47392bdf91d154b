"""The command `baton`: generate, invariance, serve, info, demo.

Results go to standard output or a file, everything for humans to standard error. Torch and
transformers are imported only when a command needs them, so that help and wrong options respond at
once.
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
from .serve import serve

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
    model: Any, tokenizer: Any, batching: options.Batching, policy: Any, generation_config: Any
) -> Any:
    """The relay.

    Raises:
        CommandError: the model or an option does not allow it.
    """
    from ..relay import Relay

    try:
        return Relay(
            model,
            capacity=batching.capacity,
            policy=policy,
            tokenizer=tokenizer,
            generation_config=generation_config,
            **batching.relay_options(),
        )
    # The model is not a supported Llama, a process cannot start, or a package is missing.
    except (ImportError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise CommandError(str(error)) from error


def _empty_generation_config(model: Any) -> Any:
    """A generation config that only says when an answer ends, as the model's own does."""
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
        name: of the run, shown with the progress.
        token_ids: see `run_records`.
        resume: whether the rest may be computed later: results are then written as they come, and
            those of cancelled queries are left out.
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
        # If both go to one terminal, results scroll by above the progress line.
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
            # However the run ended, answers that waited for earlier ones must not be lost with it.
            with contextlib.suppress(OSError):
                writer.flush()
            raise
        writer.flush()
    return outcome, stopping.signal


def _report(
    console: Console, relay: Any, outcome: Any, *, title: str, quiet: bool, timeline: Path | None
) -> None:
    """Reports a run: its figures, the first of its errors, its picture."""
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
@options.of_groups
def generate(
    queries: options.Queries,
    batching: options.Batching,
    answering: options.Answering,
    reporting: options.Reporting,
) -> None:
    """Answer prompts; one JSON object per query, in the order of the prompts.

    If a query fails, its object has an `error`; the other queries go on, and the exit code is 1.
    Ctrl-C writes what is finished and exits with 130. The results file appears when the run is
    over; with `--resume` it grows line by line, and what it already holds is kept.
    """
    policy = batching.make_policy()
    console = Console(stderr=True, highlight=False)
    records = _records_to_answer(queries, answering.seed, console)
    if not records:
        return
    with open_results(queries.output, resume=queries.resume) as stream:
        model, tokenizer = load(queries.model, batching.dtype, batching.threads)
        config = None if answering.generation_config else _empty_generation_config(model)
        with _open_relay(model, tokenizer, batching, policy, config) as relay:
            outcome, stopped_by = _run(
                relay,
                records,
                tokenizer,
                stream,
                console,
                name=batching.policy,
                quiet=reporting.quiet,
                token_ids=reporting.token_ids,
                resume=queries.resume,
                defaults=answering.defaults(),
                chat=answering.chat,
            )
    title = f"{len(records)} queries, {batching.slots} slots, {queries.model}"
    quiet, timeline = reporting.quiet, reporting.timeline
    _report(console, relay, outcome, title=title, quiet=quiet, timeline=timeline)
    if stopped_by is not None:
        console.print(f"stopped: {outcome.cancelled} queries were cancelled")
        raise typer.Exit(128 + stopped_by)
    if outcome.failed:
        raise typer.Exit(1)


def _records_to_answer(
    queries: options.Queries, seed: int, console: Console
) -> Sequence[PromptRecord]:
    """The records of the prompts, without those that already have results."""
    records = gather_prompts(queries.prompts, queries.prompt or [])
    check_output(queries.output, queries.prompts, queries.resume)
    warn_of_unknown_fields(console, records)
    # Numbered over all records, so that a record keeps its seed when a run is resumed.
    for index, record in enumerate(records):
        record.options.setdefault("seed", seed + index)
    if not records:
        console.print("no prompts")
    if not records or not queries.resume or queries.output is None:
        return records
    left = left_to_do(records, queries.output)
    console.print(f"{len(records) - len(left)} of {len(records)} queries have results already")
    return left


app.command()(reported(invariance))
app.command()(reported(serve))


@app.command()
@reported
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print versions, instruction sets, and which op runs where, or why it does not."""
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
        Path, typer.Option(help="Folder for the picture and the answers; it is created if missing.")
    ] = Path("demo"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file. Default: 48 prompts of the package.")
    ] = None,
    slots: options.SlotsOption = 16,
    capacity: options.CapacityOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    threads: options.ThreadsOption = None,
) -> None:
    """Answer the same prompts by run_to_completion and by baton, in turns; print both."""
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
    # Without a spinner: downloading a model draws its own progress.
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
    # The kernels have their own threads. The threads of torch's operators, of which a step calls a
    # few, would spin on the kernels' cores for milliseconds. OpenMP reads this when torch is
    # imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
