"""The prompts of `baton generate`, from all sources, without those that have results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from .errors import CommandError
from .prompts_io import EncodingError, PromptRecord, read_prompt_file, read_prompts
from .results_io import STDOUT, finished_ids, id_key


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
        except EncodingError as error:
            raise typer.BadParameter(f"{prompts} {error}") from error
    if not from_stdin:
        return records
    if sys.stdin is None or (prompts is None and sys.stdin.isatty()):
        raise typer.BadParameter("give --prompts FILE, --prompt TEXT, or pipe prompts in")
    try:
        return records + read_prompts(sys.stdin.buffer, plain_text=True)
    except EncodingError as error:
        raise typer.BadParameter(f"standard input {error}") from error


def check_output(output: Path | None, prompts: Path | None, resume: bool) -> None:
    """Results must not overwrite the prompts, and only a file can be resumed."""
    if output is None or str(output) == STDOUT:
        if resume:
            raise typer.BadParameter("--resume needs --output with a file")
        return
    if resume and output.exists() and not output.is_file():
        raise typer.BadParameter(f"--resume needs --output with a file, got {output}")
    if prompts is not None and output.exists() and prompts.exists() and output.samefile(prompts):
        raise typer.BadParameter(f"--output and --prompts are the same file, {output}")


def warn_of_unknown_fields(console: Console, records: Sequence[PromptRecord]) -> None:
    unknown = sorted({name for record in records for name in record.unknown_fields})
    if unknown:
        console.print(f"[yellow]fields without meaning, ignored:[/] {escape(', '.join(unknown))}")


def left_to_do(records: Sequence[PromptRecord], output: Path) -> list[PromptRecord]:
    """The records whose results a file does not hold yet."""
    try:
        there = finished_ids(output)
    except ValueError as error:
        raise CommandError(str(error)) from error
    left = []
    for record in records:
        key = id_key(record.id)
        if there[key]:
            there[key] -= 1
        else:
            left.append(record)
    return left
