"""The peak memory of decode steps in addition to the model, each side in a separate process.

    python -m bench.huggingface.memory MODEL DTYPE ATTENTION/CACHE ROWS COLUMNS

prints mebibytes: of the filled cache, and the peak of the steps after it. A cache that copies
itself needs the difference between the two.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table


def _status(field: str) -> float:
    """A field of /proc/self/status, in mebibytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def measure_here(name: str, dtype: str, key: str, rows: int, columns: int) -> dict[str, float]:
    """Measures in this process: mebibytes of the cache and at the peak."""
    import torch

    from . import steps

    side = next(side for side in steps.SIDES if side.key == key)
    model = steps.make_model(name, steps.DTYPES[dtype])
    if side.packed:
        steps.accelerate(model)
    model.set_attn_implementation(side.attention)
    count = 4
    tokens = columns - max(columns // 50, count)
    with torch.inference_mode():
        before = _status("VmRSS")
        cache = steps.make_cache(model, side.cache, columns)
        steps.fill([cache], model, rows, tokens)
        if side.cache == "slot":
            cache.trim()
        filled = _status("VmRSS")
        # The peak counts from here on.
        Path("/proc/self/clear_refs").write_text("5")
        decoder = steps.make_decoder(model, side, cache, rows, tokens, count, columns)
        for _ in range(count):
            decoder.step()
    return {"cache": filled - before, "peak": _status("VmHWM") - before}


def measure(name: str, dtype: str, keys: Sequence[str], rows: int, columns: int) -> list[dict]:
    """Runs one child process per side and prints a table of them."""
    found = []
    for key in keys:
        command = [sys.executable, "-m", "bench.huggingface.memory", name, dtype, key]
        done = subprocess.run(
            [*command, str(rows), str(columns)],
            cwd=Path(__file__).resolve().parents[2],
            check=True,
            capture_output=True,
            text=True,
        )
        found.append({"side": key, **json.loads(done.stdout.splitlines()[-1])})
    title = f"{name}, {rows} rows, {columns} columns, {dtype}: MiB in addition to the model"
    table = Table(title=title, title_justify="left")
    for head in ("attention/cache", "cache", "peak of 4 steps"):
        table.add_column(head)
    for record in found:
        table.add_row(record["side"], f"{record['cache']:.0f}", f"{record['peak']:.0f}")
    Console(width=110).print(table)
    return found


if __name__ == "__main__":
    name, dtype, key, rows, columns = sys.argv[1:]
    print(json.dumps(measure_here(name, dtype, key, int(rows), int(columns))))
