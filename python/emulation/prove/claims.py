"""Claims about a kernel, and their results."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

from emulation.ptx.symbolic import SymbolicMachine
from emulation.ptx.symbolic_ops import SymbolicOps
from emulation.ptx.terms import Terms

HIDDEN = "a: no influence"
OUTSIDE = "a: no reading"
BATCH = "b: batch"
PAGES = "b: pages"
COPY = "a, b: a copy"
NOBODY = "padding", "outside", "unwritten"  # classes of leaves that belong to no token
CUT = "b: cut"
FAILED = "has not ended"
STATEMENTS = {
    HIDDEN: "no byte that a token may not see is in the term of its result",
    OUTSIDE: "no byte of padding, of hidden keys or outside of the tensors is loaded",
    COPY: "every element that is written has the term of the one that belongs there, every other "
    "keeps its own",
    BATCH: "a row's terms are the same by itself and among other rows, in another slot, at another "
    "start, with another capacity, other strides and other bounds",
    PAGES: "with a block table a row's terms are those of the kernel without, for any size of "
    "its pages, wherever they lie and which other rows have some",
    CUT: "a token's terms are the same however its prompt was cut into calls",
    FAILED: "an error ended the unit; nothing is said of its calls",
}


@dataclasses.dataclass
class Claim:
    """One line of the table; refuted when there is evidence against it."""

    kernel: str
    architecture: int
    statement: str
    grid: str
    checks: int = 0
    evidence: str = ""

    def check(self, holds: bool, evidence: str) -> None:
        self.checks += 1
        if not holds and not self.evidence:
            self.evidence = evidence

    @property
    def verdict(self) -> str:
        if not self.checks:
            return "nothing to check"
        return "refuted" if self.evidence else "proved"


@dataclasses.dataclass
class Coverage:
    """Outcomes of a kernel's conditional branches: each may be taken and not taken."""

    reached: dict[int, list[int]] = dataclasses.field(default_factory=dict)
    texts: dict[int, str] = dataclasses.field(default_factory=dict)  # the instructions
    lines: dict[int, str] = dataclasses.field(default_factory=dict)  # of the source, as path:line

    def add(self, machine: SymbolicMachine) -> None:
        names = {at: label for label, at in machine.labels.items()}
        for at, times in machine.branches.items():
            self._count(at, times)
            x = machine.code[at]
            before = max((i for i in names if i <= at), default=None)
            place = "the start" if before is None else names[before]
            self.texts[at] = f"@{x.guard} bra {x.operands[0]}, after {place}"
            self.lines[at] = machine.lines.get(at, "")
            machine.branches[at] = [0, 0]

    def _count(self, at: int, times: list[int]) -> None:
        known = self.reached.setdefault(at, [0, 0])
        self.reached[at] = [a + b for a, b in zip(known, times, strict=True)]

    def join(self, other: Coverage) -> None:
        for at, times in other.reached.items():
            self._count(at, times)
        self.texts |= other.texts
        self.lines |= other.lines

    @property
    def counts(self) -> tuple[int, int]:
        return sum(n > 0 for x in self.reached.values() for n in x), 2 * len(self.reached)

    def unreached(self) -> list[tuple[str, str, str]]:
        """Source line, instruction, and what never happens there: "taken" or "not taken"."""
        return [
            (self.lines[at], self.texts[at], name)
            for at, times in sorted(self.reached.items())
            for name, n in zip(("taken", "not taken"), times, strict=True)
            if n == 0
        ]


class Prover:
    """Claims and coverage of one architecture; all of its terms are in one table."""

    def __init__(self, architecture: int, **options) -> None:
        self.architecture = architecture
        self.terms = Terms()
        self.ops = SymbolicOps(self.terms, architecture, **options)
        self.claims: list[Claim] = []
        self.coverage: dict[str, Coverage] = {}

    def claim(self, kernel: str, statement: str, grid: str) -> Claim:
        claim = Claim(kernel, self.architecture, statement, grid)
        self.claims.append(claim)
        return claim

    def keep_coverage(self) -> None:
        for kernel, machine in self.ops.kernels.items():
            self.coverage.setdefault(readable(kernel), Coverage()).add(machine)

    def influence(self, terms: list[int], allowed: int, what: str) -> str:
        """Describes terms that reach other leaves than the allowed ones."""
        if not terms:
            return f"an element that nobody writes has changed ({what})"
        return f"{self.terms.text_of(self.terms.leaves(terms[0], ~allowed)[0])} ({what})"

    def difference(self, a: int, b: int) -> str:
        x, y = self.terms.difference(a, b)
        return f"{self.terms.text(x)} is not {self.terms.text(y)}"


def look_at_reads(prover: Prover, claim: Claim) -> None:
    """Whether a call has loaded a leaf that belongs to no token."""
    terms, bad = prover.terms, []
    for term in prover.ops.shadow.reads - {0}:
        if terms.nodes[term][0] == "leaf" and terms.class_of(term) in NOBODY:
            bad.append(terms.text_of(terms.nodes[term][1]))
    claim.check(not bad, f"{bad[0]} is loaded" if bad else "")


def readable(kernel: str) -> str:
    """`decode_kernelI6__halfLi64ELi1EE` as `decode<half, 64, 1>`."""
    name, _, rest = kernel.partition("_kernelI")
    types = {"13__nv_bfloat16": "bfloat16", "6__half": "half", "f": "float"}
    parts: list[str] = []
    # A type, one that was named before, a number, or a name of an enumeration.
    one = r"(13__nv_bfloat16|6__half|f)|S\w?_|L(?:[ib]|N\w+?E)(\d+)E"
    while found := re.match(one, rest):
        parts.append(types[found[1]] if found[1] else found[2] or parts[-1])
        rest = rest[found.end() :]
    return f"{name.removeprefix('ragged_attention_')}<{', '.join(parts)}>"


def table(claims: Iterable[Claim]) -> list[str]:
    lines = [f"{'kernel':28} {'sm':>3} {'statement':16} {'checks':>7}  verdict   grid"]
    for claim in claims:
        lines.append(
            f"{claim.kernel:28} {claim.architecture:>3} {claim.statement:16} {claim.checks:>7}  "
            f"{claim.verdict:9} {claim.grid}"
        )
        if claim.evidence:
            lines.append(f"{'':33}{claim.evidence}")
    return lines
