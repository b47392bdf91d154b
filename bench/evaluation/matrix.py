"""The cells that a run measures: the default ones, the quick ones, or the command line's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from .cells import DTYPES, MODELS, WORKLOADS, Cell
from .systems import SYSTEMS

# The systems whose curves over the load are drawn.
CURVES = ("run_to_completion", "orca", "chunked", "baton_aligned", "baton")
# The systems that the smaller cells compare.
CORE = ("run_to_completion", "multi_bin", "orca", "chunked", "baton_aligned", "baton")
LOADS = (0.5, 0.75, 1.0)


def default_cells() -> list[Cell]:
    """About a quarter of an hour on two cores that reach 130 output tokens/s with 16 slots."""
    headline = Cell(
        "orca", slots=16, queries=40, divisor=4, repeats=3, peers=True, timeline=True,
        group="headline",
    )  # fmt: skip
    # One run of a policy may be 20 % slower than the next one, so all are measured three times,
    # except those that wait for queries to arrive.
    small = replace(headline, peers=False, timeline=False, systems=CORE)
    return [
        headline,
        # The undivided lengths, in the other dtype.
        replace(small, divisor=1, queries=24, slots=8, dtype="bfloat16", group="full"),
        *(
            replace(
                small,
                arrivals="poisson",
                load=load,
                repeats=1,
                dtype="bfloat16",
                systems=CURVES,
                group="rates",
            )  # fmt: skip
            for load in LOADS
        ),
        *(
            replace(
                small,
                workload=name,
                arrivals="trace",
                load=0.9,
                repeats=1,
                divisor=8,
                queries=32,
                dtype="bfloat16",
                group="traces",
            )  # fmt: skip
            for name in ("conv", "code")
        ),
        *(
            replace(
                small, slots=slots, queries=3 * slots, dtype="bfloat16", group="slots"
            )  # fmt: skip
            for slots in (4, 8, 32)
        ),
        replace(small, model="random-125m", queries=32, group="model"),
    ]


def quick_cells() -> list[Cell]:
    """Less than three minutes: every system once, one dtype, three loads."""
    headline = Cell(
        "orca", slots=8, queries=24, divisor=8, peers=True, timeline=True, group="headline"
    )
    small = replace(headline, peers=False, timeline=False, systems=CURVES)
    return [
        headline,
        replace(small, dtype="bfloat16", group="full"),
        *(
            replace(
                small, arrivals="poisson", load=load, queries=16, group="rates",
                systems=("run_to_completion", "orca", "baton"),
            )  # fmt: skip
            for load in (0.5, 1.0)
        ),
        replace(small, workload="conv", arrivals="trace", load=0.9, divisor=16, queries=16,
                group="traces"),
    ]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select cells."""
    parser.add_argument("--quick", action="store_true", help="a matrix of under three minutes")
    parser.add_argument("--models", nargs="+", choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS)
    parser.add_argument("--slots", nargs="+", type=int, metavar="N")
    parser.add_argument("--systems", nargs="+", choices=tuple(SYSTEMS))
    parser.add_argument(
        "--rates", nargs="+", type=float, metavar="PER_SECOND",
        help="Poisson arrivals at these rates instead of all at once",
    )  # fmt: skip
    parser.add_argument("--queries", type=int, help="per cell")
    parser.add_argument("--divisor", type=float, help="divides all lengths")
    parser.add_argument("--repeats", type=int)


def select(arguments: argparse.Namespace) -> list[Cell]:
    """The default or quick cells; if models, dtypes, workloads, slots or rates are given, a cell
    for each combination, with the headline's values for those that are not given."""
    cells = quick_cells() if arguments.quick else default_cells()
    axes = ("models", "dtypes", "workloads", "slots", "rates")
    if any(getattr(arguments, name) for name in axes):
        cells = _combinations(cells[0], arguments)
    changes = {
        name: getattr(arguments, name)
        for name in ("queries", "divisor", "repeats")
        if getattr(arguments, name) is not None
    }
    if arguments.systems:
        changes["systems"] = tuple(arguments.systems)
    return [replace(cell, **changes) for cell in cells]


def _combinations(base: Cell, arguments: argparse.Namespace) -> list[Cell]:
    rates: Sequence[float | None] = arguments.rates or [None]
    return [
        replace(
            base,
            model=model,
            dtype=dtype,
            workload=workload,
            slots=slots,
            queries=3 * slots,
            arrivals="at once" if rate is None else "poisson",
            rate=rate,
            # Static batches of transformers cannot take queries as they arrive.
            peers=rate is None,
            group=f"{model} {dtype} {workload} {slots}",
        )
        for model in arguments.models or [base.model]
        for dtype in arguments.dtypes or [base.dtype]
        for workload in arguments.workloads or [base.workload]
        for slots in arguments.slots or [base.slots]
        for rate in rates
    ]
