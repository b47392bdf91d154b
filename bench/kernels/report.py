"""Tables on the terminal and in Markdown, and the record of a run as JSON."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .. import commit, cpu_name
from .limits import Ceiling
from .measure import Row

PACKAGES = ("baton_kernels", "torch", "transformers")
COLUMNS = ("work", "way", "median", "p10-p90", "rate", "share", "time/ours")


def machine(device: str, threads: int) -> dict[str, object]:
    """Machine, versions and commit."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    from baton_kernels import build_info

    name = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    return {
        "device": device,
        "name": name,
        "isa": build_info()["cpu"]["isa_used"],
        "threads": threads,
        "versions": versions,
        "commit": commit(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(about: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"{about['device']}: {about['name']} ({about['isa']}), {about['threads']} threads; "
        f"{versions}; commit {about['commit']}"
    )


def ceiling_line(name: str, before: Ceiling, after: Ceiling) -> str:
    return (
        f"ceiling {name}: {before.rate:.3g} {before.unit} before, {after.rate:.3g} after "
        f"({before.how})"
    )


def add_shares(rows: Iterable[Row], ceilings: dict[str, float]) -> None:
    """Adds shares, relative to the higher of the ceilings measured before and after."""
    for row in rows:
        if row.rate and ceilings.get(row.ceiling):
            row.share = row.rate / ceilings[row.ceiling]


def _time(us: float) -> str:
    return f"{us / 1e3:.2f} ms" if us >= 1e4 else f"{us:.1f} us"


def cells(row: Row) -> tuple[str, ...]:
    """One line of a table, as text."""
    if row.median_us is None:
        return (row.work, f"{row.way} ({row.note})", "", "", "", "", "")
    spread = f"{_time(row.p10_us)}-{_time(row.p90_us)}"
    rate = f"{row.rate:.3g} {row.unit}" if row.rate else ""
    share = f"{row.share:.0%}" if row.share else ""
    ratio = f"{row.ratio:.2f}x" if row.ratio else ""
    return (row.work, row.way, _time(row.median_us), spread, rate, share, ratio)


def groups(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows of each table, by dtype and threads."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row.dtype, row.threads), []).append(row)
    return found


def print_tables(title: str, rows: list[Row], lines: list[str], console: Console) -> None:
    for (dtype, threads), part in groups(rows).items():
        table = Table(title=f"{title}, {dtype}, {threads} threads", box=box.SIMPLE_HEAD)
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("work", "way") else "right")
        last = None
        for row in part:
            work, *rest = cells(row)
            table.add_row("" if work == last else work, *rest)
            last = work
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def markdown(title: str, rows: list[Row], lines: list[str]) -> str:
    """The same tables as Markdown."""
    parts = []
    for (dtype, threads), part in groups(rows).items():
        parts.append(f"\n{title}, {dtype}, {threads} threads:\n")
        parts.append("| " + " | ".join(COLUMNS) + " |")
        parts.append("| --- | --- |" + " ---: |" * (len(COLUMNS) - 2))
        parts += ["| " + " | ".join(cells(row)) + " |" for row in part]
    parts.append("")
    parts += [f"- {line}" for line in lines]
    return "\n".join(parts)


def fill(path: Path, name: str, text: str) -> None:
    """Puts a table between `<!-- name -->` and `<!-- /name -->` of a document.

    Raises:
        ValueError: The document has no such markers.
    """
    before, begin, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not end:
        raise ValueError(f"{path} must have <!-- {name} --> and <!-- /{name} -->, got none")
    path.write_text(f"{before}{begin}{text.strip()}\n{end}{after}")
