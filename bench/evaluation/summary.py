"""Summarizes several runs: medians, spreads, and ratios run by run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def summarize(runs: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, float] | None]:
    """Median, minimum and maximum of each figure over the repeats; None where a run has none."""
    summary = {}
    for name in runs[0]:
        values = [figures[name] for figures in runs]
        summary[name] = (
            None
            if any(value is None for value in values)
            else {"median": statistics.median(values), "low": min(values), "high": max(values)}
        )
    return summary


def ratios(
    runs: Mapping[str, Sequence[Mapping[str, float]]], baseline: str, figure: str
) -> dict[str, dict[str, float]]:
    """Ratios of every system to the baseline, repeat by repeat; of medians if repeats differ in
    number."""
    theirs = [run[figure] for run in runs[baseline]]
    result = {}
    for name, figures in runs.items():
        mine = [run[figure] for run in figures]
        if len(mine) != len(theirs):
            mine, by = [statistics.median(mine)], [statistics.median(theirs)]
        else:
            by = theirs
        result[name] = summarize([{"ratio": a / b} for a, b in zip(mine, by, strict=True)])["ratio"]
    return result


def medians(cell: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """For every system of a cell, the medians of its figures."""
    return {
        name: {
            figure: value and value["median"] for figure, value in summarize(system["runs"]).items()
        }
        for name, system in cell["systems"].items()
    }
