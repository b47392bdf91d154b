"""The study: where re-batching pays, by how much, and under which assumptions."""

from __future__ import annotations

import time
from pathlib import Path

from .cases import REQUESTS, Case, run_all
from .questions import (
    CLAIM,
    MACHINES,
    PROMPT_SCALES,
    RATES,
    SERVING,
    SLOTS,
    SPLITS,
    SYSTEMS,
    WORKLOADS,
    claims,
    goodputs,
    jobs,
    machine_case,
    prompt_claims,
    split_cases,
)
from .result import Result


def run_study(*, processes: int, figures: Path | None = None) -> dict:
    """Simulates and prints everything; draws it too if a folder is given."""
    begin = time.perf_counter()
    results = run_all(jobs(), processes)
    print(
        f"{REQUESTS} requests per case; A100-80G with llama-7b unless another is named; rooflines "
        "of published\nnumbers, so these are consequences of assumptions and no measurements of "
        "any GPU"
    )
    for report in (
        _report_batches,
        _report_claims,
        _report_prompts,
        _report_machines,
        _report_rates,
        _report_goodputs,
        _report_splits,
    ):
        report(results)
    print(f"\n{len(results)} cases in {time.perf_counter() - begin:.0f} s, {processes} processes")
    if figures is not None:
        from .figures import draw

        for path in draw(results, figures):
            print(f"drawn: {path}")
    return results


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def _row(label: str, cells: list[str], width: int = 10) -> None:
    print(f"{label:<34}" + "".join(f"{cell:>{width}}" for cell in cells))


def _report_batches(results: dict) -> None:
    _title("1. Output tokens/s and device, ratio to Orca at the same slots; everything at once")
    for workload in WORKLOADS:
        _row(f"{workload}, slots:", [str(slots) for slots in SLOTS])
        for name, make in SYSTEMS.items():
            cells = []
            for slots in SLOTS:
                ours = results[make(slots, workload=workload)]
                theirs = results[Case("orca", slots, workload=workload)]
                cells.append(f"{ours.tokens_per_device / theirs.tokens_per_device:.2f}")
            _row(f"  {name}", cells)
        cells = [
            f"{results[Case('orca', s, workload=workload)].tokens_per_second:.0f}" for s in SLOTS
        ]
        _row("  (Orca's output tokens/s)", cells)


def _report_claims(results: dict) -> None:
    _title("2. BATON / Orca on Orca's lengths, by assumption")
    print(f"{'slots:':<82}{16:>6}{32:>6}")
    for sixteen, thirty_two in zip(claims(16), claims(32), strict=True):
        ratios = [sixteen.ratio(results), thirty_two.ratio(results)]
        mark = f"  reaches {CLAIM}" if max(ratios) >= CLAIM else ""
        print(f"{sixteen.text:<82}{ratios[0]:>6.2f}{ratios[1]:>6.2f}{mark}")


def _report_prompts(results: dict) -> None:
    _title("3. BATON / Orca over the share of prefill: Orca's prompts scaled, 32 slots")
    requests = Case("orca", 32).requests()
    each = sum(r.prompt_tokens for r in requests) / sum(r.output_tokens for r in requests)
    _row("prompt tokens per output token", [f"{each * scale:.2f}" for scale in PROMPT_SCALES])
    table = [prompt_claims(32, scale) for scale in PROMPT_SCALES]
    for name in table[0]:
        _row(f"  {name}", [f"{column[name].ratio(results):.2f}" for column in table])


def _report_machines(results: dict) -> None:
    _title("4. Ratio to Orca by machine, Orca's lengths, 16 slots, per device")
    _row("", list(SERVING[1:]), 20)
    for device, model in MACHINES:
        cost = machine_case("Orca", device, model).cost()
        base = results[machine_case("Orca", device, model)].tokens_per_device
        cells = [
            f"{results[machine_case(name, device, model)].tokens_per_device / base:.2f}"
            for name in SERVING[1:]
        ]
        _row(f"  {cost.parallel} x {device}, {model}", cells, 20)


def _report_rates(results: dict) -> None:
    _title("5. Conversation trace at full length, Poisson arrivals, 32 slots")
    print("per system: output tokens/s, time per token p50 / p99 (ms), time to first token p99 (s)")
    for name in SERVING:
        made = [SYSTEMS[name](32, workload="conv", rate=rate) for rate in RATES]
        print(f"  {name} ({results[made[0]].num_devices} devices)")
        for rate, case in zip(RATES, made, strict=True):
            run: Result = results[case]
            print(
                f"    {rate:.0f} requests/s: {run.tokens_per_second:6.0f}  "
                f"{1e3 * run.gap_percentile(50):5.1f} / {1e3 * run.gap_percentile(99):6.1f}  "
                f"{run.ttft_percentile(99):6.2f}  slot idle {run.slot_idle:4.0%}  "
                f"stall {run.prefill_stall:4.0%}"
            )


def _report_goodputs(results: dict) -> None:
    _title("6. Requests/s and device within bounds: first token p99 <= 2 s, time per token p99")
    sought = goodputs()
    columns = list(dict.fromkeys((workload, gap) for workload, gap, _ in sought))
    _row("", [f"{workload}, {1e3 * gap:.0f} ms" for workload, gap in columns], 22)
    for name in SERVING:
        cells = []
        for workload, gap in columns:
            rate = results[sought[workload, gap, name]]
            base = results[sought[workload, gap, "Orca"]]
            cells.append(f"{rate:.2f}" + (f" ({rate / base:.2f}x)" if base else ""))
        _row(f"  {name}", cells, 22)


def _report_splits(results: dict) -> None:
    _title("7. Prefill : decode devices, output tokens/s and device / Orca's on these; 32 slots")
    _row("", [f"{p}:{d}" for p, d in SPLITS])
    for workload in WORKLOADS:
        for name in ("BATON", "chunked"):
            cells = []
            for split in SPLITS:
                cases = split_cases(workload, *split)
                ours, theirs = results[cases[name]], results[cases["Orca"]]
                cells.append(f"{ours.tokens_per_device / theirs.tokens_per_device:.2f}")
            _row(f"  {workload}, {name}", cells)
