"""Hardware counters of four launches, by Nsight Compute."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys

from .device import Stage, run

# ncu's name of a metric -> its name in the table.
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "dram__bytes_read.sum": "DRAM read",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "load sectors",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "memory stalls",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio": "barrier stalls",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio": "math stalls",
    "sm__inst_executed_pipe_tensor.sum": "tensor instructions",
    "launch__registers_per_thread": "registers",
}


def command(profiler: str) -> list[str]:
    """The command that profiles `four_launches`; it does not change the clocks."""
    kernels = ["--kernel-name-base", "demangled", "--kernel-name", "regex:baton::"]
    output = ["--metrics", ",".join(METRICS), "--csv", "--page", "raw", "--print-units", "base"]
    program = [sys.executable, "-m", "bench.gpu_day.four_launches"]
    return [profiler, "--clock-control", "none", *kernels, *output, *program]


def launches(text: str) -> list[dict[str, str]]:
    """For each launch of ncu's table, the kernel's name and figures by the names of `METRICS`."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[first:]))))
    found = []
    for row in rows:
        # The line below the names holds units.
        if not row.get("ID"):
            continue
        figures = {short: row[name] for name, short in METRICS.items() if row.get(name)}
        found.append({"kernel": row["Kernel Name"][:120], **figures})
    return found


def ncu(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    profiler = shutil.which("ncu")
    if stage.device == "cpu" or profiler is None:
        stage.skip("ncu is not installed" if stage.device == "cuda" else "no GPU")
    if not record.wants("four launches"):
        return
    with record.attempt("four launches"):
        done = subprocess.run(
            command(profiler), capture_output=True, text=True,
            timeout=max(5.0, record.seconds_left),
        )  # fmt: skip
        print(done.stdout, done.stderr)
        found = launches(done.stdout)
        if not found:
            raise RuntimeError(f"ncu ended with {done.returncode} and no table")
        for row in found:
            record.add(row.pop("kernel"), **row)
    rows = [row for row in record.rows if "time" in row]
    record.headline = f"{len(rows)} launches"
    record.lines = [
        f"{row['case'][:60]}: "
        + ", ".join(f"{name} {row[name]}" for name in METRICS.values() if name in row)
        for row in rows
    ]


if __name__ == "__main__":
    run(ncu)
