"""compute-sanitizer's four tools on small calls, all at the same time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .device import Stage, run

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")


def command(tool: str) -> list[str]:
    """The command that runs the tool on `small_calls`."""
    return [
        "compute-sanitizer", "--tool", tool, "--print-limit", "20", "--launch-timeout", "0",
        sys.executable, "-m", "bench.gpu_day.small_calls", "--device", "cuda",
    ]  # fmt: skip


def sanitizer(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    if stage.device == "cpu" or shutil.which("compute-sanitizer") is None:
        stage.skip("compute-sanitizer is not installed" if stage.device == "cuda" else "no GPU")
    # Blocks of exactly the requested size, so that an access past the end of a tensor is an error.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryDirectory() as folder:
        logs = {tool: Path(folder) / tool for tool in TOOLS}
        jobs = {}
        for tool, log in logs.items():
            with open(log, "wb") as file:
                jobs[tool] = subprocess.Popen(
                    command(tool), stdout=file, stderr=subprocess.STDOUT, env=environment
                )
        while jobs and record.seconds_left > 0:
            for tool, job in list(jobs.items()):
                if job.poll() is not None:
                    del jobs[tool]
                    add(stage, tool, logs[tool], job.returncode)
            time.sleep(0.1)
        for tool, job in jobs.items():
            job.kill()
            job.wait()
            add(stage, tool, logs[tool], None)
    record.headline = "; ".join(f"{row['case']}: {row['found']}" for row in record.rows)
    record.save()


def add(stage: Stage, tool: str, log: Path, code: int | None) -> None:
    """Adds one tool's row, with an error if the tool reports one."""
    text = log.read_text(errors="replace")
    print(f"== {tool}\n{text}")
    match = FOUND.search(text)
    calls = text.count("\n") and len([x for x in text.splitlines() if not x.startswith("====")])
    if code is None:
        found = f"not done after {calls} calls"
    elif match is None:
        found = f"ended with {code} and no summary"
    else:
        found = f"{match[1]} errors in {calls} calls"
    clean = match is not None and match[1] == "0" and code == 0
    stage.record.add(tool, found=found, text=text[-4000:], **({} if clean else {"error": found}))


if __name__ == "__main__":
    run(sanitizer)
