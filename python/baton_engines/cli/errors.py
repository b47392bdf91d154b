"""Turns a command's errors into a line for the user and an exit code.

2: the command line cannot be carried out as given; 1: queries failed, or the run did.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.markup import escape

from ..query.errors import is_failure
from .results_io import OutputError

USAGE = 2
FAILED = 1
_INTERRUPTED = 130

_Arguments = ParamSpec("_Arguments")
# Typer's own errors know how to print themselves. Some versions of it bring their own copy of
# click, so the class is found by its name. A reader that closes the pipe, as `head` does, is not an
# error of ours.
_PASSED_ON: tuple[type[BaseException], ...] = (
    typer.Exit,
    typer.Abort,
    *(
        kind
        for kind in typer.BadParameter.__mro__
        if kind.__name__ == "ClickException" and issubclass(kind, BaseException)
    ),
    BrokenPipeError,
)
_show_tracebacks = False


class CommandError(Exception):
    """Ends a command with a message and an exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def show_tracebacks(shown: bool) -> None:
    """Whether errors are printed with a traceback, for bug reports."""
    global _show_tracebacks
    _show_tracebacks = shown


def reported(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """A command whose errors all become one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            command(*arguments, **options)
        except _PASSED_ON:
            raise
        except KeyboardInterrupt as error:
            _end("interrupted", _INTERRUPTED, error)
        except BaseException as error:
            if not is_failure(error):
                raise
            _end(*explained(error), error)

    return run


def explained(error: BaseException) -> tuple[str, int]:
    """The message for the user, and the exit code."""
    from ..invariance import TargetError
    from ..llama.load import ModelLoadError

    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, ModelLoadError):
        return str(error), USAGE
    if isinstance(error, (OutputError, TargetError)):
        return str(error), FAILED
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        reason = str(error) or "the system gives no more"
        return f"not enough memory: {reason}; try a smaller --capacity or fewer --slots", USAGE
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", FAILED
    return (
        f"unexpected {type(error).__name__}: {error} (baton --traceback COMMAND shows where)",
        FAILED,
    )


def _end(message: str, code: int, error: BaseException) -> NoReturn:
    if _show_tracebacks:
        raise error
    if sys.stderr is not None:
        line = " ".join(message.split())
        Console(stderr=True).print(f"[bold red]error:[/] {escape(line)}", soft_wrap=True)
    raise typer.Exit(code) from None
