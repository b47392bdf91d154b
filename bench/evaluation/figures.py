"""The pictures of a run. Each function returns a matplotlib Figure, or None if its data is
missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from baton_engines.cli.timeline import Panel, draw_timeline
from baton_engines.relay.counters import Span

from .summary import medians, ratios

DPI = 110
INK, FAINT, GRID = "#2B2F36", "#6B7280", "#E3E5E9"
LIMIT = "#B3261E"
# A color per system in all pictures: strong for ours, muted for those it is compared with.
COLORS = {
    "run_to_completion": "#9AA3B2",
    "multi_bin": "#6B7A99",
    "padded_orca": "#E0B27A",
    "orca": "#E08A1E",
    "chunked": "#B5651D",
    "baton_concat": "#A9D6C4",
    "baton_aligned": "#59B38F",
    "baton": "#12805C",
    "baton_never": "#2C6E9B",
    "baton_overlapped": "#5B4BB7",
    "baton_apart": "#A04BB7",
    "transformers_static": "#C9C4BC",
    "transformers_continuous": "#8C857B",
    "openvino": "#4C6FA8",
    "vllm": "#7A4F9A",
}
STAYS = ("run_to_completion", "orca", "baton", "baton_overlapped")
CAPTIONS = {
    "run_to_completion": "a batch waits for its longest query",
    "orca": "prompts and answers share every step",
    "baton": "a free slot goes to the next query at once",
    "baton_overlapped": "the same, prompts on half of the cores",
}


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the pictures of a run.

    Args:
        results: what `evaluate` returned.
        folder: created if it does not exist.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = results["cells"]
    # The pictures of a single cell show the first one whose spans were kept.
    head = next((cell for cell in cells if cell["timeline"]), cells[0])
    drawn = {
        "throughput": throughput(head),
        "slot_time": idle_split(head),
        "load": load_curves([cell for cell in cells if cell["group"] == "rates"]),
        "all_cells": all_cells(cells),
    }
    paths = []
    for name, figure in drawn.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    if timelines(head, folder / "timelines.png"):
        paths.append(folder / "timelines.png")
    return paths


def timelines(cell: Mapping[str, Any], path: Path) -> bool:
    """Draws when each query held which slot, a panel per system; returns whether there was data."""
    middle = medians(cell)
    panels = [
        Panel(
            name,
            [Span(*span) for span in cell["systems"][name]["spans"]],
            cell["slots"],
            middle[name]["slot_idle"],
            middle[name]["output_tokens_per_second"],
            CAPTIONS[name],
        )
        for name in STAYS
        if cell["systems"].get(name, {}).get("spans")
    ]
    if not panels:
        return False
    draw_timeline(
        panels, path, title="Who held which slot when", note=f"{cell['title']}. Same answers."
    )
    return True


def throughput(cell: Mapping[str, Any]) -> Figure:
    """Output tokens per second of every system, and the limit."""
    middle = medians(cell)
    names = list(middle)
    figure, axes = _figure(10.5, 0.36 * len(names) + 1.3)
    limit = cell["output_tokens"] / cell["limit_seconds"]
    for row, name in enumerate(names):
        values = [run["output_tokens_per_second"] for run in cell["systems"][name]["runs"]]
        value = middle[name]["output_tokens_per_second"]
        axes.barh(row, value, color=COLORS[name], height=0.72, linewidth=0)
        if len(values) > 1:
            axes.plot([min(values), max(values)], [row, row], color=INK, linewidth=1.2)
        axes.text(
            max(*values, value) + limit * 0.01, row, f"{value:,.0f}  ({value / limit:.0%})",
            va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.axvline(limit, color=LIMIT, linewidth=1.6)
    axes.text(
        limit * 0.992, -0.75, f"limit {limit:,.0f}: nothing ever idle", color=LIMIT, fontsize=9,
        ha="right", va="center",
    )  # fmt: skip
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -1.15)
    axes.set_xlim(0, limit * 1.04)
    axes.set_xlabel("output tokens per second (in brackets: share of the limit)", color=INK)
    _dress(axes, "x")
    return figure


SHARES = (
    ("decode", "computing its next token", "#12805C"),
    ("prefill", "its prompt is computed, here or elsewhere", "#7BC8A4"),
    ("joint", "in a step shared with prompts: computing, or waiting for them", "#E9C46A"),
    ("padding", "of that, computing padding", "#E08A1E"),
    ("stall", "waiting while another query's prompt is computed", "#E58A9B"),
    ("empty", "slot empty", "#D5D8DE"),
)  # fmt: skip


def slot_time(system: Mapping[str, Any], slots: int) -> dict[str, float]:
    """Shares of slots x time of the first run, by what slots did; they add up to 1."""
    run = system["runs"][0]
    whole = run["seconds"] * slots
    busy = {"decode": 0.0, "prefill": 0.0}
    for _, _, begin, end, kind in system["spans"]:
        busy[kind] += (end - begin) / whole
    shares = dict.fromkeys((name for name, _, _ in SHARES), 0.0)
    # A shared step counts for all rows that take part in it, whether prompt or answer.
    joint = min(run["joint_share"] * run["rows_per_step"] / slots, sum(busy.values()))
    shares["prefill"] = max(0.0, busy["prefill"] - joint)
    shares["decode"] = max(0.0, sum(busy.values()) - joint - shares["prefill"])
    shares["padding"] = joint * run["joint_padding"]
    shares["joint"] = joint - shares["padding"]
    shares["stall"] = min(run["prefill_stall"], 1 - sum(busy.values()))
    shares["empty"] = max(0.0, 1 - sum(shares.values()))
    return shares


def idle_split(cell: Mapping[str, Any]) -> Figure | None:
    """Stacked bars: what the slots did with their time."""
    names = [name for name, system in cell["systems"].items() if system["spans"]]
    if not names:
        return None
    figure, axes = _figure(10.5, 0.36 * len(names) + 1.7)
    for row, name in enumerate(names):
        left = 0.0
        for key, value in slot_time(cell["systems"][name], cell["slots"]).items():
            color = next(color for own, _, color in SHARES if own == key)
            axes.barh(row, value, left=left, color=color, height=0.72, linewidth=0)
            if value >= 0.035:
                axes.text(
                    left + value / 2, row, f"{value:.0%}", ha="center", va="center", fontsize=8,
                    color="white" if key == "decode" else INK,
                )  # fmt: skip
            left += value
    axes.set_yticks(range(len(names)), [_label(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("share of all slots' time", color=INK)
    _dress(axes, "x")
    figure.legend(
        handles=[Line2D([], [], marker="s", linestyle="", markersize=9, color=c)
                 for _, _, c in SHARES],
        labels=[text for _, text, _ in SHARES],
        loc="upper center", ncols=2, frameon=False, fontsize=8.5, labelcolor=INK,
        bbox_to_anchor=(0.55, 0.0),
    )  # fmt: skip
    return figure


def load_curves(cells: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Latencies against the rate at which queries arrive, a line per system."""
    if len(cells) < 2:
        return None
    cells = sorted(cells, key=lambda cell: cell["offered_queries_per_second"])
    panels = (
        ("ttft_p50", "time to first token, median"),
        ("time_per_token_p99", "time per token, 99th percentile"),
        ("normalized_latency_p50", "whole time per token of a query, median"),
    )
    figure, all_axes = _figure(10.5, 3.9, columns=len(panels))
    names = [name for name in cells[0]["systems"] if all(name in c["systems"] for c in cells)]
    middles = [medians(cell) for cell in cells]
    offered = [cell["offered_queries_per_second"] for cell in cells]
    limit = cells[0]["limit_queries_per_second"]
    # A limit far to the right would leave no room for the lines.
    near = limit < 2 * max(offered)
    for axes, (key, title) in zip(all_axes, panels, strict=True):
        for name in names:
            axes.plot(
                offered, [middle[name][key] for middle in middles], color=COLORS[name],
                marker="o", markersize=4.5, linewidth=2.4 if name == "baton" else 1.6,
                label=_label(name), zorder=3 if name == "baton" else 2,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(_short_seconds))
        axes.yaxis.set_minor_formatter(NullFormatter())
        if near:
            axes.axvline(limit, color=LIMIT, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.set_xlabel("queries arriving per second", color=INK)
        right = limit * 1.06 if near else max(offered) * 1.12
        axes.set_xlim(0, right)
        axes.text(
            limit if near else right, 0.98, f"limit {limit:,.3g}/s{'' if near else ' >'} ",
            transform=axes.get_xaxis_transform(), color=LIMIT, fontsize=8.5, ha="right", va="top",
        )  # fmt: skip
        _dress(axes, "both")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", ncols=5, frameon=False, fontsize=9, labelcolor=INK,
        bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    return figure


def all_cells(cells: Sequence[Mapping[str, Any]], baseline: str = "orca") -> Figure | None:
    """Every system's output tokens per second as a ratio to the baseline's, a row per cell."""
    cells = [
        cell for cell in cells if baseline in cell["systems"] and cell["arrivals"] == "at once"
    ]
    if not cells:
        return None
    figure, axes = _figure(10.5, 0.62 * len(cells) + 1.3)
    shown: dict[str, Any] = {}
    limits, highest = [], 1.0
    for row, cell in enumerate(cells):
        runs = {
            name: system["runs"]
            for name, system in cell["systems"].items()
            if system["kind"] == "relay"
        }
        axes.axhline(row, color=GRID, linewidth=0.8, zorder=0)
        for name, ratio in ratios(runs, baseline, "output_tokens_per_second").items():
            shown[name] = axes.scatter(
                ratio["median"], row, s=90 if name == "baton" else 55, color=COLORS[name],
                edgecolor="white", linewidth=0.8, zorder=4 if name == "baton" else 3,
            )  # fmt: skip
        limit = cell["output_tokens"] / cell["limit_seconds"]
        limits.append(limit / medians(cell)[baseline]["output_tokens_per_second"])
        highest = max(highest, *(dot.get_offsets()[0][0] for dot in axes.collections))
    for row, limit in enumerate(limits):
        # A limit far to the right would leave no room for the dots.
        if limit < 2.5 * highest:
            axes.scatter(limit, row, marker="|", s=260, color=LIMIT, linewidth=1.8, zorder=2)
        else:
            axes.text(1.0, row + 0.06, f"limit {limit:.0f} >", color=LIMIT, fontsize=8.5,
                      transform=axes.get_yaxis_transform(), ha="right", va="top")  # fmt: skip
    axes.axvline(1, color=FAINT, linewidth=1)
    axes.set_yticks(range(len(cells)), [short_title(cell) for cell in cells])
    axes.set_ylim(len(cells) - 0.4, -0.6)
    axes.set_xlabel(f"output tokens per second, {_label(baseline)} = 1; red: the limit", color=INK)
    _dress(axes, "x")
    figure.legend(
        shown.values(), [_label(name) for name in shown], loc="upper center", ncols=5,
        frameon=False, fontsize=9, labelcolor=INK, bbox_to_anchor=(0.5, 0.0),
    )  # fmt: skip
    return figure


def short_title(cell: Mapping[str, Any]) -> str:
    """The cell in two short lines, for an axis."""
    divided = "" if cell["divisor"] == 1 else f" / {cell['divisor']:g}"
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[cell["dtype"]]
    return f"{cell['workload']}{divided}, {cell['slots']} slots\n{cell['model']} {dtype}"


def _label(name: str) -> str:
    return name.replace("_", " ")


def _short_seconds(value: float, _: object = None) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _dress(axes: Any, grid: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(axis="both", which="both", colors=INK, length=0, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
