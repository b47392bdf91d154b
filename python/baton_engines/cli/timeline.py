"""Draws which query held which slot when: one colored bar per query, its prefill darker, idle slots
gray.

Takes spans like those of Relay.timeline: slot, query_id, begin, end (seconds of one clock) and kind
"prefill" or "decode". Draws only through matplotlib's Figure, so neither pyplot's global state nor
a display is involved.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Ten hues of similar weight; neighbors in the list differ in hue, and black text is readable on
# all.
PALETTE = (
    "#6FA8DC",
    "#F4A261",
    "#7BC8A4",
    "#E58A9B",
    "#B39DDB",
    "#E9C46A",
    "#62B6CB",
    "#D4A5C9",
    "#A3C76D",
    "#E08E6D",
)
IDLE = "#E9EAED"
INK = "#2B2F36"
FAINT = "#6B7280"
BAR_HEIGHT = 0.8
# A pause shorter than this share of the axis is thinner than a pixel, so the bar spans it.
MERGE_SHARE = 0.002


class SpanLike(Protocol):
    """A span to draw; the relay's Span is one."""

    @property
    def slot(self) -> int: ...
    @property
    def query_id(self) -> int: ...
    @property
    def begin(self) -> float: ...
    @property
    def end(self) -> float: ...
    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Panel:
    """One run to draw.

    `slot_idle` is the share of slots x steps that no query used, as Relay.summary() gives it;
    `caption` explains in a few words what the reader sees.
    """

    name: str
    spans: Sequence[SpanLike]
    num_slots: int
    slot_idle: float
    tokens_per_second: float
    caption: str = ""

    @property
    def seconds(self) -> float:
        """From the beginning of the first span to the end of the last one."""
        if not self.spans:
            return 0.0
        return max(s.end for s in self.spans) - min(s.begin for s in self.spans)


def panel_of(relay: Any, caption: str = "") -> Panel:
    """A panel with everything that a Relay has done so far."""
    summary = relay.summary()
    spans = relay.timeline
    # There may have been more slots earlier.
    num_slots = max([summary["num_slots"], *(span.slot + 1 for span in spans)])
    return Panel(
        summary["policy"],
        spans,
        num_slots,
        summary["slot_idle"],
        summary["output_tokens_per_second"],
        caption,
    )


@dataclass(frozen=True)
class Bar:
    """Consecutive spans of a query in a slot; kind "held" is its whole stay, with pauses."""

    slot: int
    query_id: int
    begin: float
    end: float
    kind: str


def merge_spans(spans: Iterable[SpanLike], tolerance: float = 0.0) -> list[Bar]:
    """One bar per run of spans with the same slot, query and kind.

    Args:
        tolerance: the longest pause in seconds that does not end a bar.
    """
    bars: list[Bar] = []
    for span in sorted(spans, key=lambda s: (s.slot, s.begin, s.end)):
        last = bars[-1] if bars else None
        if (
            last is not None
            and (last.slot, last.query_id, last.kind) == (span.slot, span.query_id, span.kind)
            and span.begin - last.end <= tolerance
        ):
            end = max(last.end, span.end)
            bars[-1] = Bar(last.slot, last.query_id, last.begin, end, last.kind)
        else:
            bars.append(Bar(span.slot, span.query_id, span.begin, span.end, span.kind))
    return bars


def merge_stays(spans: Iterable[SpanLike]) -> list[Bar]:
    """One bar of kind "held" per stay of a query in a slot, from its prefill to its last token."""
    held = [Bar(s.slot, s.query_id, s.begin, s.end, "held") for s in spans]
    return merge_spans(held, tolerance=float("inf"))


def _shade(color: str, lightness: float) -> tuple[float, float, float]:
    """The color at another lightness: below 1 darker by that factor, above 1 closer to white."""
    hue, own, saturation = colorsys.rgb_to_hls(*to_rgb(color))
    own = own * lightness if lightness <= 1 else 1 - (1 - own) / lightness
    return colorsys.hls_to_rgb(hue, own, saturation)


def _draw_panel(axes: Any, panel: Panel, time_limit: float) -> None:
    origin = min((s.begin for s in panel.spans), default=0.0)
    first_id = min((s.query_id for s in panel.spans), default=0)
    figure_width = axes.figure.get_size_inches()[0] * axes.get_position().width
    inches_per_second = figure_width / time_limit
    lower = BAR_HEIGHT / 2

    def draw(bar: Bar, color: Any, **style: Any) -> None:
        axes.broken_barh(
            [(bar.begin - origin, bar.end - bar.begin)],
            (bar.slot - lower, BAR_HEIGHT),
            facecolors=color,
            **style,
        )

    for slot in range(panel.num_slots):
        draw(Bar(slot, first_id, origin, origin + panel.seconds, "idle"), IDLE, linewidth=0)
    stays = merge_stays(panel.spans)
    for bar in stays:
        draw(bar, _shade(PALETTE[(bar.query_id - first_id) % len(PALETTE)], 2.4), linewidth=0)
    prefill_ends = {}
    for bar in merge_spans(panel.spans, tolerance=MERGE_SHARE * time_limit):
        color = PALETTE[(bar.query_id - first_id) % len(PALETTE)]
        if bar.kind == "prefill":
            prefill_ends[bar.slot, bar.query_id, bar.begin] = bar.end
            # Hatching a bar of a few pixels would hide its color.
            wide = (bar.end - bar.begin) * inches_per_second >= 0.08
            draw(
                bar,
                _shade(color, 0.6),
                linewidth=0,
                edgecolor="white",
                hatch="////" if wide else None,
            )
        else:
            draw(bar, color, linewidth=0)
    for bar in stays:
        draw(bar, "none", edgecolor="white", linewidth=0.9)
        number = str(bar.query_id - first_id + 1)
        # A stay begins with a prefill, and nothing is readable on its dark hatching.
        begin = prefill_ends.get((bar.slot, bar.query_id, bar.begin), bar.begin)
        # A digit of the 7 point font is about 0.06 inches wide; one more for air on both sides.
        if (bar.end - begin) * inches_per_second >= (len(number) + 1) * 0.06:
            axes.text(
                (begin + bar.end) / 2 - origin,
                bar.slot,
                number,
                ha="center",
                va="center_baseline",
                fontsize=7,
                color=INK,
                clip_on=True,
            )
    _dress_axes(axes, panel)


def _dress_axes(axes: Any, panel: Panel) -> None:
    axes.set_ylim(panel.num_slots - 0.4, -0.6)
    axes.set_ylabel("slot", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    facts = (
        panel.caption,
        f"{panel.slot_idle:.0%} of the slots' steps idle",
        f"{panel.tokens_per_second:,.0f} tokens/s",
        f"done after {panel.seconds:.1f} s",
    )
    name = panel.name.replace("_", r"\_")
    heading = rf"$\bf{{{name}}}$   " + "   ·   ".join(fact for fact in facts if fact)
    axes.set_title(heading, loc="left", fontsize=10.5, color=INK)
    axes.axvline(panel.seconds, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=4)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(axis="both", colors=FAINT, length=0)
    axes.grid(axis="x", color="#D5D8DE", linewidth=0.6)
    axes.set_axisbelow(True)


def draw_timeline(panels: Sequence[Panel], path: Path, *, title: str, note: str = "") -> None:
    """Draws one panel per run, one above the other on a shared time axis, and writes the picture.

    Args:
        panels: runs to draw; time 0 of each is its first span.
        path: file to write; the suffix chooses the format (png, svg, pdf).
        title: heading of the picture.
        note: a line of small print under the heading.

    Raises:
        ValueError: no panels, or a suffix that matplotlib cannot write.
    """
    if not panels:
        raise ValueError("draw_timeline: panels must be at least one, got 0")
    time_limit = max(panel.seconds for panel in panels) or 1.0
    panel_inches = [max(1.4, 0.19 * panel.num_slots) for panel in panels]
    # Inches for the heading, for the axis with the legend, and between two panels.
    top, bottom, between = 1.15 if note else 0.85, 0.95, 0.55
    height = sum(panel_inches) + top + bottom + between * (len(panels) - 1)
    figure = Figure(figsize=(11.5, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes_list: list[Any] = []
    upper = height - top
    for inches in panel_inches:
        box = (0.06, (upper - inches) / height, 0.915, inches / height)
        axes_list.append(figure.add_axes(box, sharex=axes_list[0] if axes_list else None))
        upper -= inches + between
    for axes, panel in zip(axes_list, panels, strict=True):
        axes.set_xlim(0, time_limit * 1.01)
        _draw_panel(axes, panel, time_limit)
    for axes in axes_list[:-1]:
        axes.tick_params(axis="x", labelbottom=False)
    if len(panels) > 1:
        _mark_time_saved(axes_list, panels)
    axes_list[-1].set_xlabel("time in seconds", color=INK)
    axes_list[-1].xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10]))
    axes_list[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left = 0.06
    figure.text(left, 1 - 0.30 / height, title, fontsize=15, weight="bold", color=INK, va="center")
    if note:
        figure.text(left, 1 - 0.60 / height, note, fontsize=9.5, color=FAINT, va="center")
    figure.legend(
        handles=[
            Patch(facecolor=_shade(PALETTE[0], 0.6), edgecolor="white", hatch="////", linewidth=0),
            Patch(facecolor=PALETTE[0]),
            Patch(facecolor=_shade(PALETTE[0], 2.4)),
            Patch(facecolor=IDLE),
        ],
        labels=[
            "prefill",
            "decode (a color and number per query)",
            "paused by a prefill",
            "idle slot",
        ],
        loc="lower right",
        bbox_to_anchor=(0.98, 0.12 / height),
        ncols=4,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    figure.savefig(path, dpi=150)


def _mark_time_saved(axes_list: Sequence[Any], panels: Sequence[Panel]) -> None:
    """Writes how much sooner a run ended than the slowest, in the free space to the right of it."""
    slowest = max(panel.seconds for panel in panels)
    for axes, panel in zip(axes_list, panels, strict=True):
        saved = slowest - panel.seconds
        if saved < 0.02 * slowest:
            continue
        middle = (panel.num_slots - 1) / 2
        axes.annotate(
            "",
            xy=(panel.seconds, middle),
            xytext=(slowest, middle),
            arrowprops={"arrowstyle": "->", "color": FAINT, "linewidth": 1.2},
        )
        # Below a tenth of the axis the words would not fit next to the bars.
        if saved >= 0.1 * slowest:
            axes.text(
                panel.seconds + saved / 2,
                middle - 0.35,
                f"{saved:.1f} s sooner",
                ha="center",
                va="bottom",
                fontsize=9.5,
                color=INK,
            )
