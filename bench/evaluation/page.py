"""Writes the pictures, and the report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from . import figures, tables
from .summary import medians, ratios

TEMPLATE = Path(__file__).parent / "report.html"
DPI = 110


def write(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.html and the pictures of a run.

    Args:
        results: what `evaluate` returned.
        folder: existing or not.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = results["cells"]
    head = headline(results)
    drawn = {
        "throughput": figures.throughput(head),
        "slot_time": figures.idle_split(head),
        "load": figures.load_curves([cell for cell in cells if cell["group"] == "rates"]),
        "all_cells": figures.all_cells(cells),
    }
    paths = {}
    for name, figure in drawn.items():
        if figure is not None:
            paths[name] = folder / f"{name}.png"
            figure.savefig(paths[name], dpi=DPI, bbox_inches="tight", pad_inches=0.12)
    if figures.timelines(head, folder / "timelines.png"):
        paths["timelines"] = folder / "timelines.png"
    report = folder / "report.html"
    report.write_text(page(results, paths), encoding="utf-8")
    return [report, *paths.values()]


def headline(results: Mapping[str, Any]) -> Mapping[str, Any]:
    """The cell that the pictures show: the first one whose spans were kept."""
    return next((cell for cell in results["cells"] if cell["timeline"]), results["cells"][0])


def page(results: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    """The report.

    Args:
        results: what `evaluate` returned.
        pictures: PNG files by name.
    """
    head = headline(results)
    escaped = html.escape
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {
            "cell": escaped(head["title"]),
            "facts": escaped(tables.facts(head)),
            "sentences": "".join(f"<li>{sentence}</li>" for sentence in _sentences(head)),
            "systems": "".join(
                f'<tr><td><span class="dot" style="background:{figures.COLORS[name]}"></span>'
                f"{escaped(name)}</td><td>{escaped(system['says'])}</td></tr>"
                for name, system in head["systems"].items()
            ),
            "tables": "".join(_cell_section(cell) for cell in results["cells"]),
            "machine": "".join(f"<li>{escaped(line)}</li>" for line in tables.machine(results)),
            **{
                name: _picture(pictures.get(name), alt)
                for name, alt in (
                    ("throughput", "Output tokens per second of every system"),
                    ("timelines", "Timelines of the slots"),
                    ("slot_time", "What the slots did with their time"),
                    ("load", "Latencies over the arrival rate"),
                    ("all_cells", "Ratios to Orca in all settings"),
                )
            },
        }
    )
    return text


def _sentences(cell: Mapping[str, Any]) -> list[str]:
    """What the headline cell says, in words; only what was measured in it."""
    middle = medians(cell)
    if "baton" not in middle:
        return []
    ours = middle["baton"]
    runs = {name: system["runs"] for name, system in cell["systems"].items()}
    sentences = [
        f"<b>baton</b> gives {ours['output_tokens_per_second']:,.0f} output tokens per second, "
        f"{ours['limit_share']:.0%} of what this machine could do with nothing ever idle."
    ]
    for name, words in (
        ("run_to_completion", "waiting for whole batches"),
        ("orca", "Orca, the system that the paper compares itself with"),
        ("chunked", "chunked prefill, what engines use today"),
        ("transformers_static", "transformers' own <code>generate</code>"),
    ):
        if name in middle:
            ratio = ratios(runs, name, "output_tokens_per_second")["baton"]["median"]
            p99 = ours["time_per_token_p99"], middle[name]["time_per_token_p99"]
            sentences.append(
                f"That is <b>{ratio:.2f}x</b> {words}; the slowest hundredth of its tokens comes "
                f"{_slower(*p99)}."
            )
    total = sum(system["agreement"]["queries"] for system in cell["systems"].values())
    equal = sum(system["agreement"]["equal_queries"] for system in cell["systems"].values())
    sentences.append(
        f"{equal:,} of {total:,} answers of all systems are equal token by token to baton's."
    )
    return sentences


def _slower(ours: float | None, theirs: float | None) -> str:
    if not ours or not theirs:
        return "at times that were not measured"
    ours_text, theirs_text = tables.seconds(ours), tables.seconds(theirs)
    return f"after {ours_text} or more, there after {theirs_text}"


def _cell_section(cell: Mapping[str, Any]) -> str:
    parts = [f"<h3>{html.escape(cell['title'])}</h3><p>{html.escape(tables.facts(cell))}.</p>"]
    for sheet in tables.sheets(cell):
        heading = "".join(f"<th>{html.escape(text)}</th>" for text in sheet.headings)
        rows = "".join(
            f"<tr{' class=ours' if row[0] == 'baton' else ''}>"
            + "".join(f"<td>{html.escape(text)}</td>" for text in row)
            + "</tr>"
            for row in sheet.rows
        )
        parts.append(
            f'<div class="wide"><table class="figures"><thead><tr>{heading}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )
    return "".join(parts)


def _picture(path: Path | None, alt: str) -> str:
    if path is None:
        return '<p class="none">This run did not measure it.</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'
