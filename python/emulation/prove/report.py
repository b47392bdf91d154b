"""The table of all proofs, for people and for docs/proof.md."""

from __future__ import annotations

import collections
import re
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from emulation.artifacts import ROOT
from emulation.prove.claims import BATCH, COPY, CUT, HIDDEN, OUTSIDE, PAGES, Claim, Coverage
from emulation.prove.everything import is_expected
from emulation.prove.runs import Result

COLUMNS = {
    "influence": (HIDDEN, COPY), "loads": (OUTSIDE,), "batch": (BATCH, COPY), "pages": (PAGES,),
    "cut": (CUT,),
}  # fmt: skip
DTYPES = ("bfloat16", "float16", "float32")


def family(claim: Claim) -> str:
    """A kernel's name without dtype and head dim."""
    parts = [x for x in claim.kernel.split(", ") if x not in DTYPES and " dims" not in x]
    return ", ".join(parts)


def cell(claims: Sequence[Claim]) -> str:
    """Verdict and number of checks of a kernel's claims."""
    if not claims:
        return ""
    checks = sum(claim.checks for claim in claims)
    refuted = [claim for claim in claims if claim.evidence]
    if not refuted:
        return f"proved, {checks}"
    if len(refuted) == len(claims):
        return f"**refuted**, {checks}"
    where = {(x.kernel, f"sm_{x.architecture}") for x in refuted}
    names = "; ".join(sorted(f"{kernel}, {sm}" for kernel, sm in where))
    return f"proved, {checks}, but **refuted**: {names}"


def markdown(claims: Iterable[Claim]) -> list[str]:
    """One row for each kind of kernel."""
    rows: dict[str, list[Claim]] = collections.defaultdict(list)
    for claim in claims:
        rows[family(claim)].append(claim)
    lines = [
        "| kernel | dtypes | PTX of | " + " | ".join(COLUMNS) + " |",
        "| --- " * (3 + len(COLUMNS)) + "|",
    ]
    for name, of_kernel in rows.items():
        dtypes = [x for x in DTYPES if any(x in claim.kernel.split(", ") for claim in of_kernel)]
        architectures = sorted({claim.architecture for claim in of_kernel})
        cells = [
            cell([claim for claim in of_kernel if claim.statement in statements])
            for statements in COLUMNS.values()
        ]
        lines.append(
            f"| {name} | {', '.join(dtypes)} | {', '.join(f'sm_{x}' for x in architectures)} | "
            + " | ".join(cells)
            + " |"
        )
    return lines


def evidence(claims: Iterable[Claim]) -> list[str]:
    """The evidence against claims, one line for each kind of kernel and statement."""
    found: dict[tuple[str, str], Claim] = {}
    for claim in claims:
        if claim.evidence:
            found.setdefault((family(claim), claim.statement), claim)
    return [
        f"- {name}, {statement.partition(': ')[2]}"
        f"{' (expected)' if is_expected(claim) else ' (**not expected**)'}: `{claim.evidence}`"
        for (name, statement), claim in found.items()
    ]


def joined(results: Iterable[Result]) -> dict[tuple[str, int], Coverage]:
    """Coverage by kernel and architecture."""
    kernels: dict[tuple[str, int], Coverage] = {}
    for result in results:
        for kernel, coverage in result.coverage.items():
            kernels.setdefault((kernel, result.architecture), Coverage()).join(coverage)
    return kernels


def commit() -> str:
    """The checkout's commit, and whether files differ from it."""
    name = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return name.stdout.strip() or "no commit"


def fill(path: Path, lines: Sequence[str]) -> None:
    """Puts lines between `<!-- proofs -->` and `<!-- /proofs -->` of a document.

    Raises:
        ValueError: The document has no such place.
    """
    pattern = r"(<!-- proofs -->\n).*?(<!-- /proofs -->)"
    text, count = re.subn(
        pattern, lambda found: found[1] + "\n".join(lines) + "\n" + found[2], path.read_text(),
        flags=re.DOTALL,
    )  # fmt: skip
    if count != 1:
        raise ValueError(f"{path} must have <!-- proofs --> and <!-- /proofs -->, got none")
    path.write_text(text)
