"""Writes results: to a file that appears whole or grows line by line, to standard output or a
device.

After any failure (a full disk, Ctrl-C, a model that cannot be loaded) the output consists of whole
lines, and an older file stays until a new one can replace it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

STDOUT = "-"


class OutputError(OSError):
    """Results could not be written; the message says where, why, and what has been written."""


class LineStream(Protocol):
    """The stream that a ResultWriter writes to."""

    def write(self, line: bytes) -> object:
        """Write one whole line, including its end."""


class FileStream:
    """Whole lines to a file descriptor.

    Args:
        descriptor: open for writing.
        name: what to call it in errors.

    Attributes:
        descriptor: as given.
        num_lines: written so far.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        self._name = name
        self._is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        self.num_lines = 0

    def write(self, line: bytes) -> None:
        """Write the whole line; if that fails on a regular file, nothing of it remains.

        Raises:
            OutputError: it could not be written.
            BrokenPipeError: the reader of a pipe has closed it.
        """
        begin = os.lseek(self.descriptor, 0, os.SEEK_CUR) if self._is_file else 0
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self.descriptor, rest) :]
        except BaseException as error:
            if self._is_file:
                with contextlib.suppress(OSError):
                    os.ftruncate(self.descriptor, begin)
                    os.lseek(self.descriptor, begin, os.SEEK_SET)
            if isinstance(error, OSError) and error.errno != errno.EPIPE:
                raise _cannot_write(self._name, error) from error
            raise
        self.num_lines += 1


@contextlib.contextmanager
def open_results(output: Path | None, *, resume: bool = False) -> Iterator[LineStream]:
    """A stream for results; an older file stays until the block has ended without an error.

    A file is written under another name and renamed at the end. If the block raises, what it has
    written stays under that name, and the error mentions it. With `resume`, lines are appended to
    the file as they come.

    Args:
        output: a file, a device, "-" or None for standard output.
        resume: append to the file.

    Raises:
        OutputError: it cannot be opened or written.
    """
    if output is None or str(output) == STDOUT:
        yield _standard_output()
        return
    # If `output` is a link, it keeps pointing at the file.
    target = Path(os.path.realpath(output))
    in_place = resume or (target.exists() and not target.is_file())
    if in_place:
        descriptor = _open(target, os.O_RDWR | os.O_CREAT if resume else os.O_WRONLY)
        with contextlib.closing(os.fdopen(descriptor, "r+b" if resume else "wb", buffering=0)):
            if resume:
                _drop_torn_line(descriptor)
            yield FileStream(descriptor, str(output))
        return
    if target.exists() and not os.access(target, os.W_OK):
        raise _cannot_write(str(output), PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    partial, descriptor = _open_beside(target)
    stream = FileStream(descriptor, str(output))
    try:
        with contextlib.closing(os.fdopen(descriptor, "wb", buffering=0)):
            yield stream
        if target.exists():
            partial.chmod(stat.S_IMODE(target.stat().st_mode))
        partial.replace(target)
    except BaseException as error:
        if stream.num_lines == 0:
            partial.unlink(missing_ok=True)
        elif isinstance(error, Exception):
            raise OutputError(
                f"{error}; the {stream.num_lines} results so far are in {partial}"
            ) from error
        raise


def is_terminal(stream: LineStream) -> bool:
    """Whether a stream is standard output on a terminal."""
    return isinstance(stream, FileStream) and os.isatty(stream.descriptor)


def finished_ids(output: Path) -> Counter[str]:
    """Counts the results of each id, as `id_key` spells it, in a file; torn lines do not count.

    Args:
        output: a file of results, or a name that does not exist yet.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file holds something else than results.
    """
    ids: Counter[str] = Counter()
    if not output.exists():
        return ids
    with output.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                ids[id_key(json.loads(line)["id"])] += 1
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{output} must hold results to resume, got something else in line {number}"
                ) from error
    return ids


def id_key(record_id: object) -> str:
    """An id as a key that keeps 1 and "1" apart."""
    return json.dumps(record_id)


class ResultWriter:
    """Writes JSONL records, each after all records before it.

    The order in which queries finish depends on policy and machine. The order in the file does not,
    so two runs can be compared with `diff`.

    Args:
        stream: where lines go.
        in_order: whether a record waits for those before it. If not, it is written at once, and
            when the program ends early only unfinished queries are lost.
    """

    def __init__(self, stream: LineStream, *, in_order: bool = True) -> None:
        self._stream = stream
        self._in_order = in_order
        self._waiting: dict[int, dict[str, Any]] = {}
        self._next = 0

    def put(self, index: int, record: dict[str, Any]) -> None:
        """Takes the record of the prompt number `index` (from 0)."""
        if not self._in_order:
            self._write(record)
            return
        self._waiting[index] = record
        while self._next in self._waiting:
            self._write(self._waiting.pop(self._next))
            self._next += 1

    def flush(self) -> None:
        """Writes the records that still wait, for a run that ends early."""
        for index in sorted(self._waiting):
            self._write(self._waiting.pop(index))

    def _write(self, record: dict[str, Any]) -> None:
        try:
            line = json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # Lone surrogates exist in JSON strings but not in UTF-8.
            line = json.dumps(record).encode()
        self._stream.write(line + b"\n")


class _StandardOutput:
    """Python's own standard output where it has no descriptor, e.g. in a test or a notebook."""

    def write(self, line: bytes) -> None:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()


def _standard_output() -> LineStream:
    if sys.stdout is None:
        raise OutputError("cannot write standard output: it is closed")
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return _StandardOutput()
    # Bypasses Python's buffer, which would keep a line that could not be written and fail again at
    # the end of the program.
    sys.stdout.flush()
    return FileStream(descriptor, "standard output")


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags, 0o666)
    except OSError as error:
        raise _cannot_write(str(path), error) from error


def _open_beside(target: Path) -> tuple[Path, int]:
    """A new file in the same folder: renaming works there, and it overwrites no older file."""
    number = 1
    while True:
        partial = target.with_name(f"{target.name}.partial{'' if number == 1 else f'-{number}'}")
        try:
            return partial, os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise _cannot_write(str(target), error) from error


def _drop_torn_line(descriptor: int) -> None:
    """Cuts a file after its last whole line and continues from there."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    end, block = size, 1 << 16
    while end:
        begin = max(0, end - block)
        found = os.pread(descriptor, end - begin, begin).rfind(b"\n")
        if found >= 0:
            end = begin + found + 1
            break
        end = begin
    if end < size:
        os.ftruncate(descriptor, end)
    os.lseek(descriptor, end, os.SEEK_SET)


def _cannot_write(name: str, error: OSError) -> OutputError:
    return OutputError(f"cannot write {name}: {error.strerror or error}")
