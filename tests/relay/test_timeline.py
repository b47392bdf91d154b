"""The picture of slots over time: which spans are merged, and which colors it contains."""

from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from baton_engines.cli.timeline import (
    IDLE,
    PALETTE,
    Bar,
    Panel,
    draw_timeline,
    merge_spans,
    merge_stays,
    panel_of,
)


def span(slot, query_id, begin, end, kind="decode"):
    return SimpleNamespace(slot=slot, query_id=query_id, begin=begin, end=end, kind=kind)


def pixels(path, color):
    """Number of pixels of that color."""
    image = imread(path)[:, :, :3]
    return int((np.abs(image - np.array(to_rgb(color))).max(axis=-1) < 0.01).sum())


def test_merge_spans_by_hand():
    spans = [
        span(0, 7, 1.0, 1.5, "prefill"),
        span(0, 7, 1.5, 2.0),
        span(0, 7, 2.1, 3.0),
        span(1, 8, 0.0, 1.0),
        span(0, 9, 3.0, 4.0),
        span(0, 7, 4.0, 5.0),
    ]
    assert merge_spans(spans, tolerance=0.05) == [
        Bar(0, 7, 1.0, 1.5, "prefill"),
        Bar(0, 7, 1.5, 2.0, "decode"),
        Bar(0, 7, 2.1, 3.0, "decode"),
        Bar(0, 9, 3.0, 4.0, "decode"),
        Bar(0, 7, 4.0, 5.0, "decode"),
        Bar(1, 8, 0.0, 1.0, "decode"),
    ]
    assert merge_spans(spans, tolerance=0.2)[1] == Bar(0, 7, 1.5, 3.0, "decode")


def test_a_stay_ends_when_another_query_takes_the_slot():
    spans = [
        span(0, 1, 0.0, 1.0, "prefill"),
        span(0, 1, 3.0, 4.0),
        span(0, 2, 4.0, 5.0),
        span(0, 1, 6.0, 7.0),
    ]
    assert merge_stays(spans) == [
        Bar(0, 1, 0.0, 4.0, "held"),
        Bar(0, 2, 4.0, 5.0, "held"),
        Bar(0, 1, 6.0, 7.0, "held"),
    ]


def test_seconds_count_from_the_first_span():
    assert Panel("baton", [span(0, 0, 10.0, 11.0), span(1, 1, 10.5, 13.0)], 2, 0, 0).seconds == 3.0
    assert Panel("baton", [], 2, 0, 0).seconds == 0.0


def test_panel_of_relay():
    spans = [span(0, 0, 0.0, 1.0)]
    summary = {
        "policy": "baton",
        "num_slots": 4,
        "slot_idle": 0.25,
        "output_tokens_per_second": 10.0,
    }
    relay = SimpleNamespace(summary=lambda: summary, timeline=spans)
    assert panel_of(relay) == Panel("baton", spans, 4, 0.25, 10.0)


def test_colors_of_busy_and_idle(tmp_path):
    full = [span(slot, slot, 100.0, 104.0) for slot in range(2)]
    half = [span(0, 0, 100.0, 104.0), span(1, 1, 100.0, 102.0)]
    for name, spans in (("full", full), ("half", half)):
        draw_timeline([Panel("baton", spans, 2, 0.0, 1.0)], tmp_path / f"{name}.png", title=name)
    one, other = (pixels(tmp_path / "full.png", color) for color in PALETTE[:2])
    assert one > 10_000 and abs(one - other) < 0.02 * one
    # The legend shows one patch of idle gray in every picture.
    legend = pixels(tmp_path / "full.png", IDLE)
    idle = pixels(tmp_path / "half.png", IDLE) - legend
    assert idle == pytest.approx(one / 2, rel=0.05)
    assert pixels(tmp_path / "half.png", PALETTE[1]) == pytest.approx(one / 2, rel=0.05)
    # No third query, so no third color.
    assert pixels(tmp_path / "half.png", PALETTE[2]) == 0


def test_two_panels_share_time(tmp_path):
    slow = Panel("run_to_completion", [span(0, 0, 0.0, 8.0)], 1, 0.0, 5.0)
    fast = Panel("baton", [span(0, 1, 50.0, 54.0)], 1, 0.0, 10.0)
    alone, both = tmp_path / "alone.png", tmp_path / "both.png"
    draw_timeline([fast], alone, title="alone")
    draw_timeline([slow, fast], both, title="both", note="4 s against 8 s")
    # Colors count from each panel's first query, and the fast run takes half the axis.
    assert pixels(both, PALETTE[0]) == pytest.approx(1.5 * pixels(alone, PALETTE[0]), rel=0.05)


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("num_slots", [1, 64])
def test_edges(tmp_path, suffix, num_slots):
    path = tmp_path / f"picture.{suffix}"
    draw_timeline([Panel("run_to_completion", [], num_slots, 1.0, 0.0)], path, title="nothing ran")
    assert path.stat().st_size > 1000


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="panels must be at least one, got 0"):
        draw_timeline([], tmp_path / "picture.png", title="")
    with pytest.raises(ValueError, match="xyz"):
        panel = Panel("baton", [], 1, 0.0, 0.0)
        draw_timeline([panel], tmp_path / "picture.xyz", title="")
