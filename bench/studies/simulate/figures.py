"""The study in three small pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from .cases import Case
from .questions import CLAIM, RATES, SERVING, SLOTS, SYSTEMS, WORKLOADS, claims

_COLORS = dict(zip(SYSTEMS, (*plt.get_cmap("tab10").colors, "black"), strict=True))


def draw(results: dict, folder: Path) -> list[Path]:
    """Writes the pictures; the same results give the same files.

    Args:
        results: from `study.run_study`.
        folder: created if it does not exist.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {
        "simulation_assumptions.png": _assumptions,
        "simulation_slots.png": _slots,
        "simulation_rates.png": _rates,
    }
    paths = []
    for name, picture in pictures.items():
        figure = picture(results)
        paths.append(folder / name)
        # Without matplotlib's version, which would be the only change between two releases.
        figure.savefig(paths[-1], dpi=80, metadata={"Software": None})
        plt.close(figure)
    return paths


def _assumptions(results: dict):
    made = claims(32)
    ratios = [claim.ratio(results) for claim in made]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    colors = ["tab:orange" if ratio >= CLAIM else "tab:blue" for ratio in ratios]
    # Bars start at 1, because they show ratios.
    axes.barh(range(len(made)), [ratio - 1 for ratio in ratios], left=1, color=colors)
    for place, ratio in enumerate(ratios):
        axes.text(1.03 * max(ratio, 1), place, f"{ratio:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(made)), [claim.text for claim in made], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(0.4, max(ratios) * 1.4)
    axes.set_xticks([0.5, 1, CLAIM, 4, 10], ["0.5", "1", str(CLAIM), "4", "10"])
    axes.minorticks_off()
    axes.axvline(1, color="black", linewidth=1)
    axes.axvline(CLAIM, color="black", linewidth=1, linestyle="--")
    figure.suptitle(
        f"BATON / Orca, output tokens/s, 32 slots, by assumption (simulated); dashed: {CLAIM}",
        fontsize=10,
    )
    return figure


def _slots(results: dict):
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, workload in zip(all_axes, WORKLOADS, strict=True):
        for name, make in SYSTEMS.items():
            ratios = [
                results[make(slots, workload=workload)].tokens_per_device
                / results[Case("orca", slots, workload=workload)].tokens_per_device
                for slots in SLOTS
            ]
            axes.plot(SLOTS, ratios, marker="o", markersize=3, label=name, color=_COLORS[name])
        axes.set_xscale("log", base=2)
        axes.set_xticks(SLOTS, map(str, SLOTS))
        axes.set_xlabel("slots")
        axes.set_title(workload)
        axes.set_ylim(0, 1.5)
    all_axes[0].set_ylabel("output tokens/s per device / Orca (simulated)")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)  # fmt: skip
    return figure


def _rates(results: dict):
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    values = (
        ("output tokens/s per device", lambda run: run.tokens_per_device),
        ("time per token p99 (ms)", lambda run: 1e3 * run.gap_percentile(99)),
        ("time to first token p99 (s)", lambda run: run.ttft_percentile(99)),
    )
    for axes, (label, value) in zip(all_axes, values, strict=True):
        for name in SERVING:
            runs = [results[SYSTEMS[name](32, workload="conv", rate=rate)] for rate in RATES]
            axes.plot(RATES, list(map(value, runs)), marker="o", markersize=3, label=name,
                      color=_COLORS[name])  # fmt: skip
        axes.set_xlabel("requests/s, conversation trace (simulated)")
        axes.set_title(label)
    for axes in all_axes[1:]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  fontsize=8)  # fmt: skip
    return figure
