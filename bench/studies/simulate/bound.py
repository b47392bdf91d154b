"""A bound for any schedule on one device, and where prefill next to decoding can pay.

A schedule is a number of forwards of each kind: c prompt tokens together with d decoding rows. In
any order, prompts and answers have to be computed:

`least = min sum x(c, d) seconds(c, d)`, where `sum x c = prompt tokens, sum x d = output tokens`

The bound ignores which query is in which forward, and that a slot belongs to one query at a time,
so no policy is faster (up to the grid of c and d: all numbers to 64, then eight per doubling). With
separate forwards only (c = 0 or d = 0) it is the bound of separate prefill on the same device; the
ratio of the two is the most that computing them together can gain.
"""

from __future__ import annotations

import numpy as np

from baton_engines.policies import Work

from .costs import CostModel

RATIOS = (0.25, 1.0, 4.0, 16.0, 64.0)
SLOTS = (1, 4, 8, 16, 32, 64, 128, 256)
# Prompt tokens of a forward.
CHUNKS = (*range(65), *(round(2 ** (i / 8)) for i in range(49, 89)))


def least_seconds(
    cost: CostModel, prompt_per_output: float, slots: int, columns: int, *, apart: bool = False
) -> float:
    """A lower bound on the seconds per output token of any schedule.

    Computed by the dual problem: a prompt token is worth `price` seconds, an output token the rest,
    and together they are worth at most the time of every forward.

    Args:
        cost: the device's.
        prompt_per_output: prompt tokens per output token.
        slots: the most rows that decode in a forward.
        columns: mean number of cached tokens of a row.
        apart: whether a forward has either prompt tokens or decoding rows, never both.
    """
    rows = [d for d in CHUNKS if d < slots] + [slots]
    kinds = [(c, d) for c in CHUNKS for d in rows if (c or d) and not (apart and c and d)]
    c = np.array([kind[0] for kind in kinds], dtype=float)
    d = np.array([kind[1] for kind in kinds], dtype=float)
    seconds = np.array([cost.forward(_work(*kind, columns)).seconds for kind in kinds])
    decodes = d > 0

    def value(price: float) -> float:
        left = (seconds[decodes] - price * c[decodes]) / d[decodes]
        return price * prompt_per_output + float(left.min())

    low, high = 0.0, float((seconds[~decodes] / c[~decodes]).min())
    # The value is concave in the price.
    for _ in range(80):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        low, high = (first, high) if value(first) < value(second) else (low, second)
    return value((low + high) / 2)


def _work(chunk: int, rows: int, columns: int) -> Work:
    return Work(
        tokens=chunk + rows,
        rows=rows + (chunk > 0),
        decode_rows=rows,
        decode_columns=rows * columns,
        prefill_columns=chunk,
        # Whole prompts have the length of a row.
        pairs=chunk * columns // 2,
    )


def bound_by_compute(cost: CostModel, columns: int = 0) -> int:
    """The number of rows from which a decode step takes at least 1.5 times as long as with one
    row."""
    alone = cost.forward(_work(0, 1, columns)).seconds
    rows = 1
    while cost.forward(_work(0, rows, columns)).seconds < 1.5 * alone and rows < 4096:
        rows += 1
    return rows


def report(name: str, cost: CostModel, columns: int) -> str:
    """A table, by slots and prompt tokens per output token: the most that joint forwards gain over
    separate ones."""
    head = "".join(f"{ratio:>9g}" for ratio in RATIOS)
    lines = [
        f"{name}: a decode step takes 1.5 times that of one row from {bound_by_compute(cost)} rows "
        f"on; rows of {columns} columns",
        "the most that prefill next to decoding gains over separate prefill, by prompt tokens per "
        "output token",
        f"{'slots':<8}{head}   output tokens/s at most",
    ]
    for slots in SLOTS:
        gains, most = [], []
        for ratio in RATIOS:
            joint = least_seconds(cost, ratio, slots, columns)
            gains.append(least_seconds(cost, ratio, slots, columns, apart=True) / joint)
            most.append(1 / joint)
        lines.append(
            f"{slots:<8}"
            + "".join(f"{gain:>9.2f}" for gain in gains)
            + "   "
            + " ".join(f"{rate:.0f}" for rate in most)
        )
    return "\n".join(lines)
