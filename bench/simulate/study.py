"""The study: where re-batching pays, by how much, and under which assumptions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .cases import REQUESTS, Case, Goodput, run_all
from .result import Result

SLOTS = (8, 16, 32, 64)
WORKLOADS = ("orca", "conv", "code")
STALL = (("max_stall_tokens", 256),)
APART = {"prefill": "apart", "prefillers": 1}
RATES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
PROMPT_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
CLAIM = 1.75

# What is compared, all on the same devices; "apart" has one prefill device per decode device.
SYSTEMS: dict[str, Callable[..., Case]] = {
    "run to completion": lambda slots, **kw: Case("run_to_completion", slots, **kw),
    "multi-bin, 4 bins": lambda slots, **kw: Case("multi_bin", slots, **kw),
    "padded Orca": lambda slots, **kw: Case("padded_orca", slots, **kw),
    "Orca": lambda slots, **kw: Case("orca", slots, **kw),
    "chunked, 512": lambda slots, **kw: Case("chunked", slots, **kw),
    "chunked, 256": lambda slots, **kw: Case("chunked", slots, (("token_budget", 256),), **kw),
    "BATON serial": lambda slots, **kw: Case("baton", slots, **kw),
    "BATON stall <= 256": lambda slots, **kw: Case("baton", slots, STALL, **kw),
    "BATON overlapped": lambda slots, **kw: Case("baton", slots, prefill="overlapped", **kw),
    "BATON apart": lambda slots, **kw: Case("baton", slots, **APART, **kw),
}
SERVING = tuple(SYSTEMS)[3:]


@dataclass(frozen=True)
class Claim:
    """A ratio of output tokens per second, and what it assumes.

    Attributes:
        text: the assumption.
        ours, theirs: what is divided by what.
        charged: whether every device counts, prefill devices too.
    """

    text: str
    ours: Case
    theirs: Case
    charged: bool = True

    def ratio(self, results: dict) -> float:
        """From results that have both cases."""
        ours, theirs = results[self.ours], results[self.theirs]
        if self.charged:
            return ours.tokens_per_device / theirs.tokens_per_device
        return ours.tokens_per_second / theirs.tokens_per_second


def claims(slots: int) -> list[Claim]:
    """Assumptions under which BATON is compared with Orca, the plainest first."""
    orca, serial = Case("orca", slots), Case("baton", slots)
    overlapped = [
        Case("baton", slots, prefill="overlapped", overlap=share) for share in (0.0, 0.5, 1.0)
    ]
    apart = Case("baton", slots, **APART)

    def launching(kernels: int) -> Case:
        return replace(orca, machine=(("kernels_per_row", kernels),))

    def reserving(device: str, model: str) -> Claim:
        where = {"device": device, "model": model}
        free = Case("orca", slots, **where)
        held = min(64, int(free.cost().kv_bytes / free.cost().bytes_per_token) // 2048)
        return Claim(
            f"serial with 64 slots, Orca holds 2048 columns per query: {device}, {model}, "
            f"{held} slots",
            Case("baton", 64, **where),
            replace(free, slots=held),
        )

    return [
        Claim("serial, as the paper shapes: concatenated, padding read",
              Case("baton", slots, shape="concatenated"), orca),
        Claim("serial, aligned in place, padding read", Case("baton", slots, shape="dense"), orca),
        Claim("serial, ragged", serial, orca),
        Claim("serial, ragged, stall <= 256 tokens", Case("baton", slots, STALL), orca),
        Claim("overlapped, no gain from sharing", overlapped[0], orca),
        Claim("overlapped, half of the ideal gain", overlapped[1], orca),
        Claim("overlapped, the ideal gain", overlapped[2], orca),
        Claim("apart, prefill device charged", apart, orca),
        Claim("apart, prefill device free", apart, orca, charged=False),
        Claim("serial, Orca launches 2 kernels per row and layer", serial, launching(2)),
        Claim("serial, Orca launches 5 kernels per row and layer", serial, launching(5)),
        Claim("apart and free, Orca launches 2 kernels per row", apart, launching(2),
              charged=False),
        reserving("A100-80G", "llama-13b"),
        reserving("T4", "llama-7b"),
        Claim("serial, against run to completion", serial, Case("run_to_completion", slots)),
        Claim("serial, against padded Orca", serial, Case("padded_orca", slots)),
    ]  # fmt: skip


def prompt_claims(slots: int, scale: float) -> dict[str, Claim]:
    """How the ratios move with the share of prefill in the work."""
    orca = Case("orca", slots, prompt_scale=scale)
    padded = Case("padded_orca", slots, prompt_scale=scale)
    apart = Case("baton", slots, prompt_scale=scale, **APART)
    return {
        "serial": Claim("", Case("baton", slots, prompt_scale=scale), orca),
        "overlapped": Claim(
            "", Case("baton", slots, prompt_scale=scale, prefill="overlapped"), orca
        ),
        "apart, charged": Claim("", apart, orca),
        "apart, free": Claim("", apart, orca, charged=False),
        "apart, 2 prefill devices, free": Claim(
            "", replace(apart, prefillers=2), orca, charged=False
        ),
        "serial / padded Orca": Claim("", Case("baton", slots, prompt_scale=scale), padded),
    }


MACHINES = [
    (device, model)
    for device in ("T4", "A100-80G", "H100")
    for model in ("llama-7b", "llama-13b", "llama-70b")
]
# Prefill and decode devices.
SPLITS = ((1, 1), (1, 2), (2, 1), (1, 3))


def machine_case(name: str, device: str, model: str) -> Case:
    """Sixteen slots on that machine."""
    return SYSTEMS[name](16, device=device, model=model)


def split_cases(workload: str, prefillers: int, decoders: int) -> dict[str, Case]:
    """So many devices, used in three ways."""
    number = prefillers + decoders
    return {
        "Orca": Case("orca", 32, workload=workload, decoders=number),
        "chunked": Case("chunked", 32, workload=workload, decoders=number),
        "BATON": Case(
            "baton", 32, workload=workload, prefill="apart", prefillers=prefillers,
            decoders=decoders,
        ),
    }  # fmt: skip


def goodputs() -> dict[tuple[str, float, str], Goodput]:
    """Rates within bounds, by workload, bound of the time per token, and system."""
    return {
        (workload, gap, name): Goodput(SYSTEMS[name](32, workload=workload), 2.0, gap)
        for workload, gap in (("orca", 0.03), ("orca", 0.1), ("conv", 0.1))
        for name in SERVING
    }


def jobs() -> Iterator[Case | Goodput]:
    """All that the study needs, the longest first."""
    yield from goodputs().values()
    for rate in RATES:
        yield from (SYSTEMS[name](32, workload="conv", rate=rate) for name in SERVING)
    for workload in ("conv", "orca", "code"):
        for slots in SLOTS:
            yield from (make(slots, workload=workload) for make in SYSTEMS.values())
        for split in SPLITS:
            yield from split_cases(workload, *split).values()
    ratios = [*claims(16), *claims(32)]
    for scale in PROMPT_SCALES:
        ratios += prompt_claims(32, scale).values()
    for ratio in ratios:
        yield from (ratio.ours, ratio.theirs)
    for machine in MACHINES:
        yield from (machine_case(name, *machine) for name in SERVING)


def run_study(*, processes: int, figures: Path | None = None) -> dict:
    """Simulate everything and print it; draw it too where a folder is given."""
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
    _title("7. Prefill : decode devices, output tokens/s and device / as many of Orca's; 32 slots")
    _row("", [f"{p}:{d}" for p, d in SPLITS])
    for workload in WORKLOADS:
        for name in ("BATON", "chunked"):
            cells = []
            for split in SPLITS:
                cases = split_cases(workload, *split)
                ours, theirs = results[cases[name]], results[cases["Orca"]]
                cells.append(f"{ours.tokens_per_device / theirs.tokens_per_device:.2f}")
            _row(f"  {workload}, {name}", cells)
