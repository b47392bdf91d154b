"""The workloads of the evaluation: when requests arrive, and their numbers of tokens.

Pure Python, so that a simulation needs nothing else. Everything random is seeded: the same
arguments give the same requests in every process.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

DATA = Path(__file__).parent / "data"
AZURE = ("conv", "code")
# Orca's evaluation (OSDI'22); both ends are included.
ORCA_PROMPT = (32, 512)
ORCA_OUTPUT = (1, 128)


@dataclass(frozen=True)
class Request:
    """One request of a workload.

    Attributes:
        arrival_seconds: after the beginning of the workload.
        prompt_tokens: length of the prompt, at least 1.
        output_tokens: number of generated tokens, at least 1, whichever tokens they are.
    """

    arrival_seconds: float
    prompt_tokens: int
    output_tokens: int


def orca(count: int, *, seed: int = 0, divisor: float = 1.0) -> list[Request]:
    """Orca's synthetic lengths, prompts U(32, 512) and outputs U(1, 128), all submitted at once.

    Args:
        count: requests.
        seed: of the lengths; the first requests are the same for every count.
        divisor: lengths are divided by it and rounded up.
    """
    generator = random.Random(seed)
    return [
        Request(
            0.0,
            _divided(generator.randint(*ORCA_PROMPT), divisor),
            _divided(generator.randint(*ORCA_OUTPUT), divisor),
        )
        for _ in range(count)
    ]


def azure(
    name: str,
    count: int,
    *,
    divisor: float = 1.0,
    compression: float = 1.0,
    first: int = 0,
    folder: Path = DATA,
) -> list[Request]:
    """A section of the Azure LLM inference trace 2023, with its real arrivals.

    Args:
        name: "conv" (conversation) or "code" (code completion).
        count: requests.
        divisor: lengths are divided by it and rounded up.
        compression: factor by which arrivals are faster than in the trace.
        first: row of the file with which the section begins.
        folder: of the files; the full traces have the same names and columns as the samples.

    Raises:
        ValueError: there is no such trace, or it has fewer rows.
    """
    if name not in AZURE:
        raise ValueError(f"azure: name must be one of {', '.join(AZURE)}, got {name!r}")
    with (folder / f"azure_llm_2023_{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if first < 0 or count < 1 or first + count > len(rows):
        raise ValueError(
            f"azure: first and count must be within the {len(rows)} rows of {name}, "
            f"got first {first} and count {count}"
        )
    rows = rows[first : first + count]
    begin = _seconds(rows[0]["TIMESTAMP"])
    return [
        Request(
            (_seconds(row["TIMESTAMP"]) - begin) / compression,
            _divided(int(row["ContextTokens"]), divisor),
            _divided(int(row["GeneratedTokens"]), divisor),
        )
        for row in rows
    ]


def at_once(requests: Iterable[Request]) -> list[Request]:
    """The same requests, all submitted at the beginning, in the same order."""
    return [replace(request, arrival_seconds=0.0) for request in requests]


def poisson(requests: Iterable[Request], rate: float, *, seed: int = 0) -> list[Request]:
    """The same requests in the same order, arriving as a Poisson process.

    The gaps for all rates are the same ones, scaled, so that rates differ only in load.

    Args:
        requests: their lengths are kept.
        rate: requests per second, above 0.
        seed: of the gaps.

    Raises:
        ValueError: the rate is not above 0.
    """
    if not rate > 0:
        raise ValueError(f"poisson: rate must be above 0, got {rate}")
    generator = random.Random(seed)
    arrived, now = [], 0.0
    for request in requests:
        now += generator.expovariate(1.0)
        arrived.append(replace(request, arrival_seconds=now / rate))
    return arrived


def offered_rate(requests: Sequence[Request]) -> float | None:
    """Requests per second over the time of their arrivals; None if all are submitted at once."""
    last = max(request.arrival_seconds for request in requests)
    return len(requests) / last if last else None


def longest(requests: Iterable[Request]) -> int:
    """The most tokens of prompt and output together: the capacity that a slot needs."""
    return max(request.prompt_tokens + request.output_tokens for request in requests)


def _divided(tokens: int, divisor: float) -> int:
    return max(1, int(-(-tokens // divisor)))


def _seconds(timestamp: str) -> float:
    # Timestamps have seven decimals, one more than datetime reads; leap seconds are not handled.
    whole, _, fraction = timestamp.partition(".")
    since = datetime.fromisoformat(whole) - datetime(2023, 1, 1)
    return since.total_seconds() + float(f"0.{fraction or 0}")
