"""The projections of a 1B's and an 8B's layers as CUDA graphs, compared with cuBLAS."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import torch
from torch.nn import functional

import baton_kernels
from baton_kernels import reference
from baton_kernels.testing import Accuracy, assert_same_bits

from ..kernels.measure import OURS, Way
from .decode import Sizes
from .device import Stage, run
from .rates import read_rate
from .timing import beside_peers, our_us, time_ways

# (out, in) of each projection of a layer, and of the logits.
MODELS = {
    "1b": {"qkv": (3072, 2048), "o": (2048, 2048), "gate_up": (16384, 2048), "down": (2048, 8192)},
    "8b": {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
    "logits 8b": {"logits": (128256, 4096)},
}
ROWS = (1, 8, 32, 128, 2048)
# The most rows for which reading the weights takes longer than multiplying them.
FEW = 128


@torch.inference_mode()
def linear(stage: Stage) -> None:
    """The stage."""
    record = stage.record
    rate, _ = read_rate(stage)
    models = stage.pick(MODELS, {"tiny": {"qkv": (96, 64), "down": (64, 96)}})
    for rows in stage.pick(ROWS, (1, 3)):
        for model, projections in models.items():
            for name, (outs, ins) in projections.items():
                label = f"{model} {name}, {rows} rows"
                if rows * outs > 2**27 or not record.wants(label, 1.0):
                    continue
                with record.attempt(label):
                    measure(stage, label, rows, outs, ins, rate)
    summary(stage)


def measure(stage: Stage, label: str, rows: int, outs: int, ins: int, rate: float) -> None:
    """One projection for one number of rows."""
    like = {"dtype": stage.dtype, "device": stage.device}
    size = outs * ins * stage.dtype.itemsize
    copies = max(2, min(32, 4 * Sizes(stage).cache_bytes // size + 1))
    weights = [torch.randn(outs, ins, **like) for _ in range(copies)]
    x = torch.randn(rows, ins, **like)
    # Accuracy is checked for some rows and outputs: float64 for all would take longer than the
    # rest.
    some, part = x[:64], weights[0][:512]
    accuracy = Accuracy(reference.linear, some, part)

    def check(y: torch.Tensor) -> None:
        accuracy.check(y[:64, :512])

    def check_bits(y: torch.Tensor) -> None:
        check(y)
        # A single row is computed with other tiles, which must not change its bits.
        for row in {0, rows // 2, rows - 1}:
            alone = baton_kernels.linear(x[row : row + 1], weights[0])
            assert_same_bits(y[row : row + 1], alone, f"row {row} of {rows}")

    ours = [functools.partial(baton_kernels.linear, x, w) for w in weights]
    ways = [
        Way("linear", ours, check_bits, OURS),
        Way("cuBLAS", [functools.partial(functional.linear, x, w) for w in weights], check),
    ]
    found = time_ways(ways, stage.device, rounds=5, seconds=0.5)
    us = our_us(found)
    stage.record.add(
        label, rows=rows, outs=outs, ins=ins, ways=found, us=us,
        share=us and rows <= FEW and 1e6 * size / us / rate or None,
        tflop_per_s=us and 2 * rows * outs * ins / us / 1e6, beside=beside_peers(found),
        **static(stage, rows, outs, ins),
    )  # fmt: skip


def static(stage: Stage, rows: int, outs: int, ins: int) -> dict[str, float]:
    """Properties of the launch that need no run: splits, waves, bytes in flight."""
    if stage.device == "cpu" or importlib.util.find_spec("triton") is None:
        return {}
    from baton_kernels.triton import common

    # The package attribute of that name is the op, not the module.
    kernels = importlib.import_module("baton_kernels.triton.linear")
    device = torch.device("cuda")
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    shared = common.shared_bytes(device)
    plan = kernels.plan(rows, outs, ins, stage.dtype.itemsize, common.dot_units(device), shared)
    resident = kernels.resident(plan, shared) * multiprocessors
    running = min(plan.programs, resident)
    return {
        "splits": plan.splits,
        "programs": plan.programs,
        "waves": plan.programs / resident,
        "flight_kb_per_sm": running * plan.flight / multiprocessors / 1024,
    }


def summary(stage: Stage) -> None:
    """One line per number of rows: the time of a model's projections, ours and cuBLAS's."""
    lines = []
    for rows in ROWS if not stage.small else (1, 3):
        for model in MODELS if not stage.small else ("tiny",):
            mine = theirs = 0.0
            flight = []
            for row in stage.record.rows:
                if row.get("rows") == rows and row["case"].startswith(f"{model} "):
                    us = {way["way"]: way.get("us") for way in row["ways"]}
                    if us.get("linear") and us.get("cuBLAS"):
                        mine, theirs = mine + us["linear"], theirs + us["cuBLAS"]
                        flight += [row["flight_kb_per_sm"]] if "flight_kb_per_sm" in row else []
            if theirs:
                lines.append(
                    f"{rows:5} rows, {model:9}: ours {mine:9.1f} us, cuBLAS {theirs:9.1f} us, "
                    f"{mine / theirs:.2f}x"
                    + (f"; at least {min(flight):.0f} KB in flight per SM" if flight else "")
                )
    stage.record.lines = lines
    stage.record.headline = "all projections of one layer, ours / cuBLAS"


if __name__ == "__main__":
    run(linear)
