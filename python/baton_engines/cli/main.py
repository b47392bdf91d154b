"""The command `baton`: generate, info, demo.

Results go to standard output or a file, everything for human eyes to standard error. Torch and
transformers are imported when a command needs them, so that help and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO

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
from .prompts_io import PromptRecord, ResultWriter, demo_prompts, read_prompt_file, read_prompts

# Failed queries that are named on the console; the results have all of them.
_ERRORS_SHOWN = 5

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="BATON: queries leave and enter a running batch between two decode steps.",
)


def fail(message: str, code: int = 2) -> typer.Exit:
    """Prints an error; raise what it returns."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return typer.Exit(code)


def load(model: str, dtype: options.Dtype, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer, or the end of the program with a message that says what to do."""
    import torch

    from ..llama import ModelLoadError, load_model

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return load_model(model, dtype=dtype.value)
    except ModelLoadError as error:
        raise fail(str(error)) from error


def gather_prompts(prompts: Path | None, texts: list[str]) -> list[PromptRecord]:
    """Queries from --prompt texts, then from a file or standard input.

    Standard input is read for "-", or when neither a file nor a text was given and it is a pipe.
    """
    records = [PromptRecord(id=number, prompt=text) for number, text in enumerate(texts, start=1)]
    from_stdin = str(prompts) == "-" if prompts is not None else not texts
    if prompts is not None and not from_stdin:
        try:
            return records + read_prompt_file(prompts)
        except OSError as error:
            reason = error.strerror or str(error)
            raise typer.BadParameter(f"cannot read {prompts}: {reason}") from error
    if not from_stdin:
        return records
    if prompts is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompts FILE, --prompt TEXT, or pipe prompts in")
    return records + read_prompts(sys.stdin.buffer, plain_text=True)


def _check_output(output: Path | None, prompts: Path | None) -> None:
    """Opening the results for writing would empty the prompts."""
    both = output is not None and prompts is not None and output.exists() and prompts.exists()
    if both and output.samefile(prompts):
        raise typer.BadParameter(f"--output and --prompts are the same file, {output}")


def _warn_of_unknown_fields(console: Console, records: Sequence[PromptRecord]) -> None:
    unknown = sorted({name for record in records for name in record.unknown_fields})
    if unknown:
        console.print(f"[yellow]fields without meaning, ignored:[/] {escape(', '.join(unknown))}")


@contextlib.contextmanager
def _result_stream(output: Path | None) -> Iterator[BinaryIO]:
    if output is None:
        yield sys.stdout.buffer
        return
    try:
        stream = output.open("wb")
    except OSError as error:
        raise fail(f"cannot write {output}: {error.strerror or error}") from error
    with stream:
        yield stream


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
    """The relay, or the end of the program with a message that says what stands against it."""
    from .. import prefill as prefills
    from ..relay import Relay

    threads = {} if prefill_threads is None else {"threads": prefill_threads}
    try:
        prefiller = prefills.get(prefill, **threads)
        return Relay(model, slots, capacity, policy, prefill=prefiller, **settings)
    # No Llama, or one with something that the patch does not know; a process that cannot start.
    except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        raise fail(str(error)) from error


def _run(
    relay: Any,
    records: Sequence[PromptRecord],
    tokenizer: Any,
    stream: BinaryIO,
    console: Console,
    *,
    name: str,
    quiet: bool,
    token_ids: bool,
    **submission: Any,
) -> tuple[Any, int | None]:
    """Answers the records, with progress on the console and results on the stream.

    Args:
        name: of the run, for the progress.
        token_ids: see `run_records`.
        submission: see `submit_records`.

    Returns:
        The Outcome, and the number of the signal that stopped the run, if one did.
    """
    from .generate import StopRequest, run_records, submit_records
    from .report import ConsoleStream, RunProgress

    with (
        RunProgress(console, name, len(records), enabled=not quiet) as progress,
        StopRequest() as stopping,
    ):
        # On a terminal that shows both, results scroll by above the progress.
        shared = progress.console is not None and stream is sys.stdout.buffer and stream.isatty()
        writer = ResultWriter(ConsoleStream(progress.console) if shared else stream)
        outcome = run_records(
            relay,
            records,
            submit_records(relay, records, tokenizer, **submission),
            on_result=writer.put,
            on_step=lambda running, done, rate: progress.update(
                running, done, rate, relay.num_slots
            ),
            stop=stopping,
            token_ids=token_ids,
        )
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
def generate(
    model: options.ModelOption = "smollm2",
    prompts: options.PromptsOption = None,
    prompt: options.PromptOption = None,
    output: options.OutputOption = None,
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
    max_new_tokens: options.MaxNewTokensOption = 128,
    temperature: options.TemperatureOption = 0.0,
    top_p: options.TopPOption = 1.0,
    top_k: options.TopKOption = 0,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    chat: options.ChatOption = True,
    token_ids: options.TokenIdsOption = False,
    timeline: options.TimelineOption = None,
    quiet: options.QuietOption = False,
) -> None:
    """Answer prompts; one JSON object per query, in the order of the prompts.

    A query that fails has an `error` in its place and does not stop the others; the exit code is
    then 1. Ctrl-C writes down what there is, and ends with 130.
    """
    if prefill == "serial" and prefill_threads is not None:
        raise typer.BadParameter("--prefill-threads needs --prefill overlapped or apart")
    made = options.make_policy(
        policy,
        admission=admission,
        max_stall_tokens=max_stall_tokens,
        token_budget=token_budget,
        bins=bins,
    )
    records = gather_prompts(prompts, prompt or [])
    _check_output(output, prompts)
    console = Console(stderr=True, highlight=False)
    _warn_of_unknown_fields(console, records)
    if not records:
        console.print("no prompts")
        return
    with _result_stream(output) as stream:
        loaded, tokenizer = load(model, dtype, threads)
        relay = _open_relay(
            loaded,
            slots,
            capacity,
            made,
            prefill=prefill,
            prefill_threads=prefill_threads,
            tokenizer=tokenizer,
            max_slots=max_slots,
            kv_budget=None if kv_budget is None else int(kv_budget * 2**20),
        )
        defaults = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": tuple(stop or ()),
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
                defaults=defaults,
                chat=chat,
                seed=seed,
            )
    title = f"{len(records)} queries, {slots} slots, {model}"
    _report(console, relay, outcome, title=title, quiet=quiet, timeline=timeline)
    if stopped_by is not None:
        console.print(f"stopped: {outcome.cancelled} queries were cancelled")
        raise typer.Exit(128 + stopped_by)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
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
    """The same prompts by run_to_completion, then by baton: picture, figures, and equal answers."""
    records = gather_prompts(prompts, []) if prompts is not None else demo_prompts()
    if not records:
        raise fail(f"{prompts} has no prompts")
    from .demo import run_demo

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fail(f"cannot make {output_dir}: {error.strerror or error}") from error
    console = Console(highlight=False)
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
        raise fail(str(error)) from error
    raise typer.Exit(0 if same else 1)


def main() -> None:
    """Entry point of the console script."""
    # The kernels have their own threads. Those of torch's operators, of which a step calls a few,
    # would spin for milliseconds on the kernels' cores. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
