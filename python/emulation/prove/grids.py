"""The grids: which calls of ragged_attention are compared with which."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

from emulation.prove.attention import Call, Outcome, Row, run
from emulation.prove.claims import BATCH, CUT, HIDDEN, OUTSIDE, Claim, Prover
from emulation.ptx.symbolic_memory import SymbolicError

TAG = "A"  # of the row whose results are compared


def placements(length: int, queries: int) -> Iterator[dict]:
    """A row by itself, then elsewhere and in company."""
    yield {"rows": (Row(TAG, length, queries),)}
    yield {
        "rows": (Row("B", 3, 1, 0, 1), Row(TAG, length, queries, 2, 5), Row("C", 20, 2, 1, 0)),
        "num_slots": 4, "capacity": length + 24, "transposed": True, "padded": True,
        "exact_bounds": False,
    }  # fmt: skip
    yield {
        "rows": (Row(TAG, length, queries, 1, 2), Row("B", length + 1, 1, 0, 0)),
        "num_slots": 2, "capacity": length + 3,
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """Lengths times cuts times options; `cuts(length)` has numbers of query tokens."""

    kernel: str
    base: Call
    lengths: Sequence[int]  # none: only cuts
    queries: Sequence[int] = (1,)
    options: Sequence[dict] = ({},)
    # Pairs of length and queries of calls that share positions, compared by CUT.
    cut: Sequence[tuple[int, int]] = ()

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        queries = ", ".join(map(str, self.queries))
        heads = "/".join(map(str, self.base.heads))
        text = f"lengths {lengths}; query tokens {queries}; {heads} heads x {self.base.head_dim}"
        return f"{text}; {len(self.options)} sets of options"


def attempt(prover: Prover, claims: Iterable[Claim], call: Call) -> Outcome | None:
    """A call's outcome; what the machine cannot follow counts against the claims."""
    try:
        return run(prover.ops, call)
    except SymbolicError as finding:
        for claim in claims:
            claim.check(False, f"{finding} ({call})")
        return None


def look(claims: dict[str, Claim], call: Call, outcome: Outcome) -> None:
    """Statement (a) of one call."""
    # Rows in company may belong to a kernel whose turn is another.
    influences = [found for found in outcome.influences if found.tag == TAG]
    for statement, found in ((HIDDEN, influences), (OUTSIDE, outcome.reads)):
        first = found[0] if found else None
        claims[statement].check(
            not found, f"{first.leaf} in {first.where} ({call})" if first else ""
        )


def same(prover: Prover, claim: Claim, a: Outcome, b: Outcome, what: str) -> None:
    """Statement (b) of two calls, for the positions that both have."""
    for key in a.results.keys() & b.results.keys():
        if key[0] != TAG:
            continue
        left, right = a.results[key], b.results[key]
        evidence = ""
        if left != right:
            pair = next((x, y) for x, y in zip(left, right, strict=True) if x != y)
            evidence = f"token {key[1]}, head {key[2]}: {prover.difference(*pair)} ({what})"
        claim.check(left == right, evidence)


def prove(prover: Prover, grids: Iterable[Grid]) -> None:
    """Runs a kernel's grids; a claim per statement."""
    for grid in grids:
        claims = {
            statement: prover.claim(grid.kernel, statement, str(grid))
            for statement in ((HIDDEN, OUTSIDE, BATCH) if grid.lengths else ())
        }
        for length, queries, options in itertools.product(grid.lengths, grid.queries, grid.options):
            if queries > length:
                continue
            alone = None
            for place in placements(length, queries):
                call = dataclasses.replace(grid.base, **place, **options)
                outcome = attempt(prover, claims.values(), call)
                if outcome is None:
                    continue
                look(claims, call, outcome)
                if alone:
                    same(prover, claims[BATCH], alone, outcome, f"alone and in {call}")
                alone = alone or outcome
        if grid.cut:
            claim = prover.claim(grid.kernel, CUT, f"(length, query tokens) {list(grid.cut)}")
            for options in grid.options:
                calls = [
                    dataclasses.replace(grid.base, rows=(Row(TAG, *pair),), **options)
                    for pair in grid.cut
                ]
                outcomes = [attempt(prover, [claim], call) for call in calls]
                pairs = itertools.combinations(zip(calls, outcomes, strict=True), 2)
                for (a, x), (b, y) in pairs:
                    # Without causality, a longer row has more keys for the same token.
                    if x and y and (a.causal or a.rows[0].length == b.rows[0].length):
                        same(prover, claim, x, y, f"{a} and {b}")
    prover.keep_coverage()
