"""The questions of the study: which systems and cases are compared, and what each ratio assumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from .cases import Case, Goodput

SLOTS = (8, 16, 32, 64)
WORKLOADS = ("orca", "conv", "code")
# How the paper handles prompts, and the same with a bound.
NEVER = (("join", "never"),)
STALL = (*NEVER, ("max_stall_tokens", 256))
APART = {"prefill": "apart", "prefillers": 1}
RATES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
PROMPT_SCALES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0, 8.0)
CLAIM = 1.75

# The compared systems, all on the same devices; "apart" has one prefill device per decode device.
SYSTEMS: dict[str, Callable[..., Case]] = {
    "run to completion": lambda slots, **kw: Case("run_to_completion", slots, **kw),
    "multi-bin, 4 bins": lambda slots, **kw: Case("multi_bin", slots, **kw),
    "padded Orca": lambda slots, **kw: Case("padded_orca", slots, **kw),
    "Orca": lambda slots, **kw: Case("orca", slots, **kw),
    "chunked, 512": lambda slots, **kw: Case("chunked", slots, (("token_budget", 512),), **kw),
    "chunked, 256": lambda slots, **kw: Case("chunked", slots, (("token_budget", 256),), **kw),
    "BATON": lambda slots, **kw: Case("baton", slots, **kw),
    "BATON serial": lambda slots, **kw: Case("baton", slots, NEVER, **kw),
    "BATON stall <= 256": lambda slots, **kw: Case("baton", slots, STALL, **kw),
    "BATON overlapped": lambda slots, **kw: Case("baton", slots, NEVER, prefill="overlapped", **kw),
    "BATON apart": lambda slots, **kw: Case("baton", slots, NEVER, **APART, **kw),
}
SERVING = tuple(SYSTEMS)[3:]


@dataclass(frozen=True)
class Claim:
    """A ratio of output tokens per second, and its assumption.

    Attributes:
        text: the assumption.
        ours, theirs: numerator and denominator.
        charged: whether every device counts, including prefill devices.
    """

    text: str
    ours: Case
    theirs: Case
    charged: bool = True

    def ratio(self, results: dict) -> float:
        """The ratio, from results that contain both cases."""
        ours, theirs = results[self.ours], results[self.theirs]
        if self.charged:
            return ours.tokens_per_device / theirs.tokens_per_device
        return ours.tokens_per_second / theirs.tokens_per_second


def claims(slots: int) -> list[Claim]:
    """Assumptions under which BATON is compared with Orca, the simplest first."""
    orca, serial = Case("orca", slots), Case("baton", slots, NEVER)
    overlapped = [
        Case("baton", slots, NEVER, prefill="overlapped", overlap=share)
        for share in (0.0, 0.5, 1.0)
    ]
    apart = Case("baton", slots, NEVER, **APART)

    def launching(kernels: int) -> Case:
        return replace(orca, machine=(("kernels_per_row", kernels),))

    def reserving(device: str, model: str) -> Claim:
        where = {"device": device, "model": model}
        free = Case("orca", slots, **where)
        held = min(64, int(free.cost().kv_bytes / free.cost().bytes_per_token) // 2048)
        return Claim(
            f"serial with 64 slots, Orca holds 2048 columns per query: {device}, {model}, "
            f"{held} slots",
            Case("baton", 64, NEVER, **where),
            replace(free, slots=held),
        )

    return [
        Claim("serial, as the paper shapes: concatenated, padding read",
              Case("baton", slots, NEVER, shape="concatenated"), orca),
        Claim("serial, aligned in place, padding read",
              Case("baton", slots, NEVER, shape="dense"), orca),
        Claim("serial, ragged", serial, orca),
        Claim("serial, ragged, stall <= 256 tokens", Case("baton", slots, STALL), orca),
        Claim("joined, ragged", Case("baton", slots), orca),
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
    """How the ratios change with prefill's share of the work."""
    orca = Case("orca", slots, prompt_scale=scale)
    padded = Case("padded_orca", slots, prompt_scale=scale)
    serial = Case("baton", slots, NEVER, prompt_scale=scale)
    apart = replace(serial, **APART)
    return {
        "serial": Claim("", serial, orca),
        "joined": Claim("", replace(serial, options=()), orca),
        "overlapped": Claim("", replace(serial, prefill="overlapped"), orca),
        "apart, charged": Claim("", apart, orca),
        "apart, free": Claim("", apart, orca, charged=False),
        "apart, 2 prefill devices, free": Claim(
            "", replace(apart, prefillers=2), orca, charged=False
        ),
        "serial / padded Orca": Claim("", serial, padded),
    }


MACHINES = [
    (device, model)
    for device in ("T4", "A100-80G", "H100")
    for model in ("llama-7b", "llama-13b", "llama-70b")
]
# Numbers of prefill and decode devices.
SPLITS = ((1, 1), (1, 2), (2, 1), (1, 3))


def machine_case(name: str, device: str, model: str) -> Case:
    """Sixteen slots on that machine."""
    return SYSTEMS[name](16, device=device, model=model)


def split_cases(workload: str, prefillers: int, decoders: int) -> dict[str, Case]:
    """The same number of devices, used in three ways."""
    number = prefillers + decoders
    return {
        "Orca": Case("orca", 32, workload=workload, decoders=number),
        "chunked": Case("chunked", 32, workload=workload, decoders=number),
        "BATON": Case(
            "baton", 32, NEVER, workload=workload, prefill="apart", prefillers=prefillers,
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
    """All jobs of the study, the longest first."""
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
