"""The command `baton`: generate, info, demo.

Results go to standard output or a file, everything for human eyes to standard error. Torch and
transformers are imported when a command needs them, so that help and wrong options answer at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from enum import Enum
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

from .prompts_io import PromptRecord, ResultWriter, demo_prompts, read_prompt_file, read_prompts

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="BATON: queries leave and enter a running batch between two decode steps.",
)

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


class Dtype(str, Enum):
    """Types a model can be loaded in; auto is the one its weights are stored in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str, typer.Option(help="`smollm2`, a Hugging Face model folder, or a hub id.")
]
SlotsOption = Annotated[int, typer.Option(min=1, help="Queries decoded at the same time.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Type of weights and cache.")]
ThreadsOption = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; as many as torch takes when left out.")
]
CapacityOption = Annotated[
    int | None, typer.Option(min=1, help="Most tokens of a query, prompt and answer together.")
]


def fail(message: str, code: int = 2) -> typer.Exit:
    """Prints an error; raise what it returns."""
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    return typer.Exit(code)


def load(model: str, dtype: Dtype, threads: int | None) -> tuple[Any, Any]:
    """Model and tokenizer, or the end of the program with a message that says what to do."""
    import torch

    from ..llama import ModelLoadError, load_model

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return load_model(model, dtype=dtype.value)
    except ModelLoadError as error:
        raise fail(str(error)) from error


def _check_policy(name: str) -> str:
    from ..policies import NAMES

    if name not in NAMES:
        raise typer.BadParameter(f"must be one of {', '.join(NAMES)}, got {name!r}")
    return name


def _check_prefill(mode: str) -> str:
    from ..prefill import NAMES

    if mode not in NAMES:
        raise typer.BadParameter(f"must be one of {', '.join(NAMES)}, got {mode!r}")
    return mode


def _make_policy(name: str, options: dict[str, Any]) -> Any:
    """The policy with those options that were given."""
    from ..policies import get

    try:
        return get(name, **{key: value for key, value in options.items() if value is not None})
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _check_picture(path: Path | None) -> Path | None:
    """Refuses before the run what would fail after it."""
    if path is None:
        return None
    if path.suffix.lower() not in PICTURE_SUFFIXES:
        raise typer.BadParameter(f"must end in {', '.join(PICTURE_SUFFIXES)}, got {path.name!r}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"the folder {path.parent} does not exist")
    return path


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


@app.command()
def generate(
    model: ModelOption = "smollm2",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file with one query per line (prompt, messages or token_ids; optional id, "
            "max_new_tokens, priority, temperature, top_p, top_k, seed, stop), text file with one "
            "prompt per line, or `-` for standard input."
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given several times.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSONL file for the results.")
    ] = None,
    slots: SlotsOption = 16,
    policy: Annotated[
        str,
        typer.Option(
            callback=_check_policy,
            help="`baton`, `chunked`, `orca`, `padded_orca`, `multi_bin` or `run_to_completion`.",
        ),
    ] = "baton",
    prefill: Annotated[
        str,
        typer.Option(
            callback=_check_prefill,
            help="Where new prompts are computed: `serial`, between two steps; `overlapped`, by a "
            "thread with cores of its own; `apart`, by another process.",
        ),
    ] = "serial",
    prefill_threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads that prompts take from decoding; default: half."),
    ] = None,
    admission: Annotated[
        str | None,
        typer.Option(help="Who enters first: `fcfs`, `shortest`, `length_aware` or `priority`."),
    ] = None,
    max_stall_tokens: Annotated[
        int | None, typer.Option(min=1, help="baton: most prompt tokens between two decode steps.")
    ] = None,
    token_budget: Annotated[
        int | None, typer.Option(min=1, help="chunked: most tokens of a forward.")
    ] = None,
    bins: Annotated[
        int | None, typer.Option(min=1, help="multi_bin: bins by `max_new_tokens`.")
    ] = None,
    max_slots: Annotated[
        int | None, typer.Option(min=1, help="Slots grow up to this while queries wait.")
    ] = None,
    kv_budget: Annotated[
        float | None,
        typer.Option(min=0.0, help="Most MiB of cached keys and values; queries are parked at it."),
    ] = None,
    capacity: CapacityOption = None,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="0 for all.")] = 0,
    seed: Annotated[
        int | None, typer.Option(help="Query i (from 0) samples with seed + i.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends an answer; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option(help="Wrap prompts in the tokenizer's chat template, if it has one.")
    ] = True,
    token_ids: Annotated[bool, typer.Option(help="Add token ids to the results.")] = False,
    timeline: Annotated[
        Path | None,
        typer.Option(callback=_check_picture, help="Picture of slots over time (png, svg, pdf)."),
    ] = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Neither progress nor summary.")
    ] = False,
) -> None:
    """Answer prompts; one JSON object per query, in the order of the prompts.

    A query that fails has an `error` in its place and does not stop the others; the exit code is
    then 1. Ctrl-C writes down what there is, and ends with 130.
    """
    if prefill == "serial" and prefill_threads is not None:
        raise typer.BadParameter("--prefill-threads needs --prefill overlapped or apart")
    options = {
        "admission": admission,
        "max_stall_tokens": max_stall_tokens,
        "token_budget": token_budget,
        "bins": bins,
    }
    made = _make_policy(policy, options)
    records = gather_prompts(prompts, prompt or [])
    # Opening the results for writing would empty the prompts.
    both = output is not None and prompts is not None and output.exists() and prompts.exists()
    if both and output.samefile(prompts):
        raise typer.BadParameter(f"--output and --prompts are the same file, {output}")
    console = Console(stderr=True, highlight=False)
    unknown = sorted({name for record in records for name in record.unknown_fields})
    if unknown:
        console.print(f"[yellow]fields without meaning, ignored:[/] {escape(', '.join(unknown))}")
    if not records:
        console.print("no prompts")
        return
    from .. import prefill as prefills
    from ..relay import Relay
    from .generate import StopRequest, run_records, submit_records
    from .report import ConsoleStream, RunProgress, summary_table
    from .timeline import draw_timeline, panel_of

    with _result_stream(output) as stream:
        loaded, tokenizer = load(model, dtype, threads)
        defaults = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "stop": tuple(stop or ()),
        }
        try:
            told = {} if prefill_threads is None else {"threads": prefill_threads}
            opened = Relay(
                loaded,
                slots,
                capacity,
                made,
                tokenizer=tokenizer,
                prefill=prefills.get(prefill, **told) or prefill,
                max_slots=max_slots,
                kv_budget=None if kv_budget is None else int(kv_budget * 2**20),
            )
        # No Llama, or one with something that the patch does not know; a process that cannot start.
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            raise fail(str(error)) from error
        with (
            opened as relay,
            RunProgress(console, policy, len(records), enabled=not quiet) as progress,
            StopRequest() as stopping,
        ):
            # On a terminal that shows both, results scroll by above the progress.
            shared = progress.console is not None and output is None and sys.stdout.isatty()
            writer = ResultWriter(ConsoleStream(progress.console) if shared else stream)
            queries = submit_records(
                relay, records, tokenizer, defaults=defaults, chat=chat, seed=seed
            )
            outcome = run_records(
                relay,
                records,
                queries,
                on_result=writer.put,
                on_step=lambda running, done, rate: progress.update(
                    running, done, rate, relay.num_slots
                ),
                stop=stopping,
                token_ids=token_ids,
            )
            writer.flush()
        if not quiet:
            console.print(summary_table({policy: relay.summary()}))
        for line in outcome.errors[:5]:
            console.print(f"[red]failed:[/] {escape(line)}", soft_wrap=True)
        if len(outcome.errors) > 5:
            console.print(f"[red]failed:[/] {len(outcome.errors) - 5} more, see the results")
        if timeline is not None:
            title = f"{len(records)} queries, {slots} slots, {model}"
            draw_timeline([panel_of(relay)], timeline, title=title)
            console.print(f"timeline: {timeline}", soft_wrap=True)
    if stopping:
        console.print(f"stopped: {outcome.cancelled} queries were cancelled")
        raise typer.Exit(128 + stopping.signal)
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
    model: ModelOption = "smollm2",
    output_dir: Annotated[
        Path, typer.Option(help="Folder for the picture and the answers; made if missing.")
    ] = Path("demo"),
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL file; the 48 prompts of the package when left out.")
    ] = None,
    slots: SlotsOption = 16,
    capacity: CapacityOption = None,
    dtype: DtypeOption = Dtype.auto,
    threads: ThreadsOption = None,
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
    # A step is hundreds of short parallel regions. Threads that spin between them are a little
    # faster on an idle machine and many times slower on a shared one, where a spinning thread
    # keeps its partner off the core. OpenMP reads this when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
