"""The tables of a run: on the terminal, and as Markdown for a document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from .summary import medians, ratios, summarize
from .systems import BASELINES

MIB = 1 << 20


class Column(NamedTuple):
    """A figure as a column: its name in a run, its heading, and how it is written."""

    figure: str
    heading: str
    form: Callable[[float], str]


def seconds(value: float) -> str:
    """A time in the most readable unit."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.0f} ms"


def share(value: float) -> str:
    """A share in percent, with one more digit if it is small."""
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def mebibytes(value: float) -> str:
    """A number of bytes in MiB."""
    return f"{value / MIB:,.0f}"


SPEED = (
    Column("output_tokens_per_second", "output tokens/s", "{:,.1f}".format),
    Column("queries_per_second", "queries/s", "{:,.2f}".format),
    Column("ttft_p50", "first token p50", seconds),
    Column("ttft_p99", "p99", seconds),
    Column("time_per_token_p50", "per token p50", seconds),
    Column("time_per_token_p99", "p99", seconds),
    Column("limit_share", "of the limit", share),
)
IDLE = (
    Column("slot_idle", "slot idle", share),
    Column("slot_idle_loaded", "while queries wait", share),
    Column("slot_prefilling", "prefilling elsewhere", share),
    Column("prefill_stall", "prefill stall", share),
    Column("joint_share", "time in joint forwards", share),
    Column("joint_padding", "padding in them", share),
    Column("cache_padding_read", "cache padding read", share),
    Column("shaping_bytes", "MiB copied to shape", mebibytes),
    Column("peak_bytes", "peak MiB above weights", mebibytes),
    Column("steps_limit_share", "limit of its steps", share),
)
SPREAD = "output_tokens_per_second"


class Sheet(NamedTuple):
    """A table: its subject, headings, and rows of cells."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def sheets(cell: Mapping[str, Any]) -> list[Sheet]:
    """The speed of all systems; then, for the relays, where the time goes."""
    middle = medians(cell)
    runs = {name: system["runs"] for name, system in cell["systems"].items()}
    against = {
        name: ratios(runs, name, SPREAD) for name in BASELINES if name in runs
    }  # fmt: skip
    speed = Sheet(
        "speed",
        [
            "system",
            *(column.heading for column in SPEED),
            *(f"x {name}" for name in against),
            "answers equal",
        ],
        [],
    )
    for name, system in cell["systems"].items():
        agreed = system["agreement"]
        speed.rows.append(
            [
                name,
                *(_cell(column, middle[name], system["runs"]) for column in SPEED),
                *(_ratio(table.get(name)) for table in against.values()),
                f"{agreed['equal_queries']}/{agreed['queries']}",
            ]
        )
    for name, reason in cell["failed"].items():
        row = [f"{name}: {reason}", *("-" for _ in speed.headings[1:])]
        speed.rows.append(row)
    idle = Sheet("where the time goes", ["system", *(column.heading for column in IDLE)], [])
    for name, system in cell["systems"].items():
        if system["kind"] == "relay":
            row = [_cell(column, middle[name], system["runs"]) for column in IDLE]
            idle.rows.append([name, *row])
    return [speed, idle]


def facts(cell: Mapping[str, Any]) -> str:
    """The cell's requests, and the least time that they can take."""
    offered = cell["offered_queries_per_second"]
    arriving = f", arriving at {offered:.2f} queries/s" if offered else ""
    return (
        f"{cell['prompt_tokens']:,} prompt and {cell['output_tokens']:,} output tokens{arriving}; "
        f"{cell['repeats']} run(s) of each system; with nothing idle {cell['limit_seconds']:.2f} s"
        + "".join(
            f"; {package} {version}"
            for about in cell["engines"].values()
            for package, version in about["versions"].items()
        )
    )


def machine(results: Mapping[str, Any]) -> list[str]:
    """The machine of the run, and the ceilings that were measured on it."""
    return [
        results["machine"],
        *(
            f"ceiling in {dtype}: {c['flops'] / 1e9:,.0f} GFLOP/s, reading "
            f"{c['read_bytes'] / 1e9:.1f} GB/s"
            for dtype, c in results["ceilings"].items()
        ),
        f"measured on {results['date']} in {results['seconds'] / 60:.1f} minutes",
        *_doubts(results),
    ]


def _doubts(results: Mapping[str, Any]) -> list[str]:
    """Figures that are only possible if the machine was busy when the ceilings were measured."""
    shares = [
        system["limit_share"] or 0 for cell in results["cells"] for system in medians(cell).values()
    ]
    if max(shares, default=0) <= 1:
        return []
    return [f"a system reached {max(shares):.0%} of the limit: the machine was busy, measure again"]


def show(results: Mapping[str, Any]) -> None:
    """Print everything."""
    # Wide enough for all columns in every terminal, because a cut table is useless.
    console = Console(width=190, highlight=False)
    for line in machine(results):
        console.print(line)
    for cell in results["cells"]:
        console.print(f"\n[bold]{cell['title']}[/]\n{facts(cell)}")
        for sheet in sheets(cell):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
            for index, heading in enumerate(sheet.headings):
                table.add_column(heading, justify="right" if index else "left")
            for row in sheet.rows:
                table.add_row(*row)
            console.print(table)


def markdown(results: Mapping[str, Any]) -> str:
    """Everything as Markdown."""
    lines = [f"- {line}" for line in machine(results)]
    for cell in results["cells"]:
        lines += ["", f"### {cell['title']}", "", facts(cell) + "."]
        for sheet in sheets(cell):
            lines += ["", f"| {' | '.join(sheet.headings)} |"]
            lines.append("| --- |" + " ---: |" * (len(sheet.headings) - 1))
            lines += [f"| {' | '.join(row)} |" for row in sheet.rows]
    return "\n".join(lines)


def _cell(column: Column, middle: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> str:
    value = middle.get(column.figure)
    if value is None:
        return "-"
    text = column.form(value)
    if column.figure == SPREAD and len(runs) > 1:
        spread = summarize(runs)[column.figure]
        text += f" ({column.form(spread['low'])}-{column.form(spread['high'])})"
    return text


def _ratio(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    if value["low"] == value["high"]:
        return f"{value['median']:.2f}"
    return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"
