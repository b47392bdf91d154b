"""Counts of the Triton projections, without a GPU: `python -m bench.triton_static`.

Programs, waves and bytes in flight follow from the plan that `linear` makes for a weight; tests
check that the compiled kernels use its shared memory and do not spill. No figure here is a speed.
"""

from __future__ import annotations

import importlib

from . import describe_run

# Multiprocessors, and the shared memory that a program may use.
CARDS = {"H100 (sm_90)": (132, 227 << 10), "A100 (sm_80)": (108, 163 << 10),
         "L40S (sm_89)": (142, 99 << 10)}  # fmt: skip
# (out, in) of the projections of a 1B and an 8B model.
WEIGHTS = {
    "1B qkv": (3072, 2048), "1B o": (2048, 2048), "1B gate, up": (16384, 2048),
    "1B down": (2048, 8192), "8B qkv": (6144, 4096), "8B o": (4096, 4096),
    "8B gate, up": (28672, 4096), "8B down": (4096, 14336),
}  # fmt: skip
ROWS = (1, 32, 128, 2048)


def table(card: str) -> list[str]:
    """A line per weight: splits, and for each number of rows, waves and KB in flight per SM."""
    kernels = importlib.import_module("baton_kernels.triton.linear")
    multiprocessors, shared = CARDS[card]
    heads = " ".join(f"{f'{rows} rows':>16}" for rows in ROWS)
    lines = [f"{card}, bfloat16; programs / resident, KB of the weight in flight per SM",
             f"{'weight':14} {'splits':>6} {heads}"]  # fmt: skip
    for name, (outs, ins) in WEIGHTS.items():
        cells = []
        for rows in ROWS:
            plan = kernels.plan(rows, outs, ins, 2, "matrix", shared)
            resident = kernels.resident(plan, shared) * multiprocessors
            flight = min(plan.programs, resident) * plan.flight / multiprocessors / 1024
            cells.append(f"{plan.programs / resident:7.2f}, {flight:4.0f} KB")
        splits = kernels.splits_of(outs, ins)
        lines.append(f"{name:14} {splits:6} " + " ".join(f"{cell:>16}" for cell in cells))
    return lines


def main() -> None:
    print(describe_run())
    for card in CARDS:
        print("\n" + "\n".join(table(card)))


if __name__ == "__main__":
    main()
