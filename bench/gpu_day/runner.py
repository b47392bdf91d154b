"""Runs stages as processes with a time limit, and saves the record whenever one of them ends.

In the output folder: `results.json` with every stage so far, `logs.txt` with their output, and
`running.json` of the running stage. A stage that fails, hangs or dies does not end the others.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .exits import BROKEN_DEVICE, SKIPPED
from .record import write_json
from .stages import Stage

# The most processes of one stage.
ATTEMPTS = 4
# A stage is not begun with less time than this, unless its limit is shorter.
LEAST_SECONDS = 8.0
# Time between SIGTERM, after which a stage may still save its results, and SIGKILL.
GRACE_SECONDS = 3.0
LOG_BYTES = 1 << 20


@dataclass
class Day:
    """Where and for how long stages run.

    Args:
        output: folder of the record.
        seconds: for all stages together.
        arguments: of every stage.
        environment: of every stage.
        about: description of the run, for the record.
    """

    output: Path
    seconds: float
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        for name in ("results.json", "logs.txt", "running.json"):
            (self.output / name).unlink(missing_ok=True)
        (self.output / "logs.txt").touch()
        self.end = time.monotonic() + self.seconds
        self.results: list[dict[str, Any]] = []

    def run(self, stage: Stage) -> dict[str, Any]:
        """Runs a stage; returns its entry of the record, which is on disk by then."""
        left = self.end - time.monotonic()
        if left < min(LEAST_SECONDS, stage.cap):
            entry = {"stage": stage.name, "state": "no time", "seconds": 0.0, "cap": stage.cap}
        else:
            entry = self._attempts(stage, min(stage.cap, left))
        self.results.append(entry)
        write_json(self.output / "results.json", {**self.about, "stages": self.results})
        return entry

    def _attempts(self, stage: Stage, seconds: float) -> dict[str, Any]:
        begin = time.monotonic()
        scratch = self.output / "running.json"
        scratch.unlink(missing_ok=True)
        states = []
        while len(states) < ATTEMPTS:
            state = self._process(stage, scratch, seconds - (time.monotonic() - begin))
            states.append(state)
            broken = state == f"failed ({BROKEN_DEVICE})" or state.startswith("died")
            # A process that made no progress would not make any the next time.
            progressed = scratch.is_file()
            if not (broken and progressed) or seconds - (time.monotonic() - begin) < LEAST_SECONDS:
                break
        entry = {
            "stage": stage.name,
            "state": states[-1],
            "seconds": round(time.monotonic() - begin, 1),
            "cap": stage.cap,
            "what": stage.what,
        }
        if len(states) > 1:
            entry["earlier"] = states[:-1]
            if states[-1] == "ok":
                entry["state"] = f"failed, then ok in process {len(states)}"
        try:
            entry |= json.loads(scratch.read_text())
        except (OSError, ValueError):
            entry["headline"] = self._last_line()
        scratch.unlink(missing_ok=True)
        return entry

    def _process(self, stage: Stage, scratch: Path, seconds: float) -> str:
        """Runs one process of the stage; returns how it ended."""
        command = [
            sys.executable, "-m", *stage.command, *self.arguments,
            "--seconds", f"{seconds:.1f}", "--json", str(scratch),
        ]  # fmt: skip
        begin = time.monotonic()
        log_path = self.output / "running.log"
        with open(log_path, "wb") as log:
            job = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env=dict(self.environment), start_new_session=True,
            )  # fmt: skip
            try:
                state = _ended(job.wait(seconds))
            except subprocess.TimeoutExpired:
                state = "hung" if _end_group(job) else "hung, and cannot be killed"
            finally:
                # Workers may outlive their process.
                _signal_group(job, signal.SIGKILL)
        self._keep_log(stage, state, time.monotonic() - begin, log_path)
        return state

    def _keep_log(self, stage: Stage, state: str, seconds: float, path: Path) -> None:
        text = path.read_bytes()
        if len(text) > LOG_BYTES:
            text = text[: LOG_BYTES // 4] + b"\n[...]\n" + text[-3 * LOG_BYTES // 4 :]
        with open(self.output / "logs.txt", "ab") as logs:
            logs.write(f"==== {stage.name}: {state} after {seconds:.1f} s\n".encode() + text)
            logs.write(b"\n")
        path.unlink()

    def _last_line(self) -> str:
        lines = (self.output / "logs.txt").read_bytes()[-400:].decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _ended(code: int) -> str:
    if code == 0:
        return "ok"
    if code == SKIPPED:
        return "skipped"
    if code < 0:
        return f"died ({signal.Signals(-code).name})"
    return f"failed ({code})"


def _signal_group(job: subprocess.Popen, number: int) -> None:
    # The group contains only the stage, which was started as a session.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.pid, number)


def _end_group(job: subprocess.Popen) -> bool:
    """Ends the process; whether it has ended: one that waits in the kernel for a device may not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        _signal_group(job, number)
        try:
            job.wait(GRACE_SECONDS)
            return True
        except subprocess.TimeoutExpired:
            continue
    return False


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """One line per stage: state, seconds and limit, and its headline."""
    lines = [f"{'stage':10} {'state':24} {'s':>6} {'cap':>5}  found"]
    for entry in results:
        lines.append(
            f"{entry['stage']:10} {entry['state']:24} {entry['seconds']:6.1f} {entry['cap']:5.0f}  "
            f"{entry.get('headline', '')}"
        )
        lines += [f"{'':10} {line}" for line in entry.get("lines", ())]
    return "\n".join(lines)
