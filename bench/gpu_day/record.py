"""A stage's part of the record: rows that are saved to disk as soon as they are known."""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .exits import BROKEN_DEVICE, is_broken


def write_json(path: Path, content: Any) -> None:
    """Writes the file completely, or leaves the existing one unchanged."""
    scratch = path.with_name(path.name + ".new")
    scratch.write_text(json.dumps(content, indent=1, default=str) + "\n")
    os.replace(scratch, path)


class Record:
    """Rows by case. If a new process repeats the stage, it continues after the last case.

    Args:
        path: of the JSON file.
        seconds: time after which no further case is begun.

    Attributes:
        rows: dicts with at least `case`.
        headline: one line for the table.
        lines: further lines for the table.
    """

    def __init__(self, path: Path, seconds: float):
        self.path = path
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.begun: list[str] = []
        self.headline = ""
        self.lines: list[str] = []
        if path.is_file():
            before = json.loads(path.read_text())
            self.rows, self.begun = before["rows"], before["begun"]

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def save(self) -> None:
        write_json(
            self.path,
            {"headline": self.headline, "lines": self.lines, "rows": self.rows,
             "begun": self.begun},
        )  # fmt: skip

    def add(self, case: str, **figures: Any) -> None:
        """Adds one row, which is on disk when this returns."""
        self.rows.append({"case": case, **figures})
        self.save()

    def wants(self, case: str, seconds: float = 0.0) -> bool:
        """Whether to run a case: not if an earlier process has begun it or no time is left."""
        if case in self.begun:
            return False
        self.begun.append(case)
        if self.seconds_left < seconds:
            self.add(case, error="no time")
            return False
        self.save()
        return True

    @contextlib.contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """An exception within the block becomes the case's row.

        Raises:
            SystemExit: the device no longer responds, so the runner begins a new process.
        """
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            text = (str(error).splitlines() or [""])[0][:300]
            self.add(case, error=f"{type(error).__name__}: {text}")
            if is_broken():
                raise SystemExit(BROKEN_DEVICE) from None

    @property
    def errors(self) -> list[str]:
        """Cases without a figure."""
        return [row["case"] for row in self.rows if row.get("error")]
