"""Pictures of a run's record: small PNG files for the documentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

Record = dict[str, dict]

OURS, PEER, LIMIT = "#1f6f8b", "#b8b8b8", "#d98c3f"
# The color of each kind of row.
COLORS = {"ours": OURS, "peer": PEER, "limit": LIMIT}


def draw(record: Record, folder: Path) -> list[Path]:
    """Draws every picture whose cases the record has.

    Args:
        record: As `--json` writes it.
        folder: Created if it does not exist.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, make in FIGURES.items():
        figure, axes = pyplot.subplots(figsize=(7.2, 4), dpi=90, layout="constrained")
        if make(axes, record["cases"]):
            about = record["machine"]
            caption = f"{about['name']}, {about['threads']} threads, commit {about['commit']}"
            figure.supxlabel(caption, fontsize=7, color="gray")
            axes.spines[["top", "right"]].set_visible(False)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1])
        pyplot.close(figure)
    return files


def _rows(cases: Record, name: str) -> list[dict]:
    return [row for row in cases.get(name, {"rows": []})["rows"] if row["median_us"]]


def roofline(axes: Axes, cases: Record) -> bool:
    """The share of its limit that each of our ops reaches, dtypes side by side."""
    bars: dict[str, dict[str, float]] = {}
    # The padding case has a separate picture.
    for name in (name for name in cases if name != "padding"):
        rows = _rows(cases, name)
        limits = {(r["work"], r["dtype"]): r for r in rows if r["kind"] == "limit"}
        for row in rows:
            if row["kind"] == "ours" and row["share"]:
                # A limit measured in turns with ours saw the same machine; the ceiling may be
                # minutes away.
                limit = limits.get((row["work"], row["dtype"]))
                share = limit["median_us"] / row["median_us"] if limit else row["share"]
                label = f"{name}: {row['work']}"
                # The first of our ways: small pages, where there are huge ones too.
                bars.setdefault(label, {}).setdefault(row["dtype"], share)
    if not bars:
        return False
    dtypes = sorted({dtype for shares in bars.values() for dtype in shares})
    axes.figure.set_size_inches(8.2, 1.2 + 0.26 * len(bars))
    height = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        places = [place + i * height for place in range(len(bars))]
        shares = [100 * shares.get(dtype, 0.0) for shares in bars.values()]
        axes.barh(places, shares, height, label=dtype)
    axes.axvline(100, color=LIMIT, linewidth=1)
    axes.set_yticks([p + 0.4 - height / 2 for p in range(len(bars))], list(bars), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("% of the limit, measured in turns with it or in the same run")
    axes.legend(fontsize=7, frameon=False)
    return True


def capacity(axes: Axes, cases: Record) -> bool:
    """Time for the same lengths as a function of the slots' capacity."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in _rows(cases, "padding"):
        shape, _, columns = row["way"].split()
        found.setdefault((row["dtype"], shape), []).append((int(columns), row["median_us"] / 1e3))
    for (dtype, shape), points in found.items():
        style = "--" if shape == "aligned" else "-"
        axes.plot(*zip(*points, strict=True), style, marker="o", label=f"{dtype}, {shape}")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity of a slot, columns")
    axes.set_ylabel("one decode step of one layer, ms")
    if found:
        axes.legend(fontsize=7, frameon=False)
    return bool(found)


def columns(axes: Axes, cases: Record) -> bool:
    """Time as a function of valid columns, by dtype and threads."""
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in _rows(cases, "scaling"):
        if row["kind"] == "ours":
            point = (row["values"]["columns"], row["median_us"] / 1e3)
            found.setdefault((row["dtype"], row["threads"]), []).append(point)
    for (dtype, threads), points in found.items():
        label = f"{dtype}, {threads} thread{'s' if threads > 1 else ''}"
        axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("valid columns of the batch")
    axes.set_ylabel("one decode step of one layer, ms")
    if found:
        axes.legend(fontsize=7, frameon=False)
    return bool(found)


def _ways(axes: Axes, cases: Record, chosen: Callable[[str], bool], title: str) -> bool:
    rows = [row for row in _rows(cases, "decode") if chosen(row["work"])]
    # The first measured dtype only, so that a picture has one scale.
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    rows.sort(key=lambda row: row["median_us"])
    names = [row["way"] for row in rows]
    times = [row["median_us"] / 1e3 for row in rows]
    axes.barh(names, times, color=[COLORS[row["kind"]] for row in rows])
    for place, row in enumerate(rows):
        axes.text(times[place], place, f" {row['ratio']:.2f}x" if row["ratio"] else "", va="center")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"ms; {title}, {rows[0]['dtype']}" if rows else "")
    return bool(rows)


def decode(axes: Axes, cases: Record) -> bool:
    """Our op, the peers and the limit on the mixed decode batch."""
    return _ways(axes, cases, lambda work: work == "32 rows of 128..2048", "32 rows of 128..2048")


def long_row(axes: Axes, cases: Record) -> bool:
    """Draws the same for one very long row and 31 short ones."""
    return _ways(axes, cases, lambda work: "among" in work, "one long row among 31 short ones")


FIGURES: dict[str, Callable[[Axes, Record], bool]] = {
    "roofline": roofline,
    "capacity": capacity,
    "columns": columns,
    "decode": decode,
    "long_row": long_row,
}
