"""Benchmarks, each run as `python -m bench.<name>`: results are checked first, then timed.

All figures of one run come from one machine and one process; compare ratios, not runs.
"""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path


def describe_run(device: str = "cpu") -> str:
    """Device, versions and commit, in one line."""
    # Imported here, because bench.workloads needs no torch.
    import torch

    versions = [f"python {platform.python_version()}"]
    for package in ("baton_kernels", "torch", "transformers"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} not installed")
    return ", ".join(
        (
            torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
            f"{torch.get_num_threads()} threads",
            *versions,
            f"commit {commit()}",
        )
    )


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    """`median (p10-p90)`; with fewer than three values, the range instead of the percentiles."""
    low, high = min(values), max(values)
    if len(values) >= 3:
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        low, high = deciles[0], deciles[-1]
    return f"{form.format(statistics.median(values))} ({form.format(low)}-{form.format(high)})"


def cpu_name() -> str:
    """The processor's name, as the system reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the running sources."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
