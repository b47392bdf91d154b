"""The grids: which calls of ragged_attention are compared with which."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

from emulation.prove.attention import Call, Outcome, Row, run
from emulation.prove.claims import BATCH, CUT, HIDDEN, OUTSIDE, PAGES, Claim, Prover
from emulation.ptx.symbolic_memory import SymbolicError

TAG = "A"  # of the row whose results are compared


def alone(length: int, queries: int) -> dict:
    return {"rows": (Row(TAG, length, queries),)}


def in_company(length: int, queries: int) -> dict:
    """Next to a row of one token, in a cache with other strides; the host knows no lengths."""
    return {
        "rows": (Row("B", 3, 1, 0, 1), Row(TAG, length, queries, 1, 5)),
        "num_slots": 2, "capacity": length + 9, "transposed": True, "padded": True,
        "exact_bounds": False,
    }  # fmt: skip


def in_mixed_company(length: int, queries: int) -> dict:
    """The same, next to a row of several tokens too, whose kernel is another one."""
    return {
        "rows": (Row("B", 3, 1, 0, 1), Row(TAG, length, queries, 2, 5), Row("C", 20, 2, 1, 0)),
        "num_slots": 4, "capacity": length + 24, "transposed": True, "padded": True,
        "exact_bounds": False,
    }  # fmt: skip


def moved(length: int, queries: int) -> dict:
    """In front of a longer row."""
    return {
        "rows": (Row(TAG, length, queries, 1, 2), Row("B", length + 1, 1, 0, 0)),
        "num_slots": 2, "capacity": length + 3,
    }  # fmt: skip


def in_crowd(length: int, queries: int) -> dict:
    """Behind enough rows for blocks to take several items; one of them has no tokens here, one no
    keys, one more tokens than keys, and one no place."""
    rows = [Row(f"R{i}", 1 + i % 3, 1, i, i % 2) for i in range(33)]
    rows[4] = Row("E", 3, 0, 4, 0)
    rows[5] = Row("N", 0, 1, 5, 3)
    rows[6] = Row("T", 1, 2, 6, 0)
    rows[7] = Row("L", 2, 1, 7, -1)
    return {
        "rows": (*rows, Row(TAG, length, queries, 33, 1)), "num_slots": 34,
        "capacity": length + 4,
    }  # fmt: skip


def between_others(length: int, queries: int) -> dict:
    """The row between rows of several tokens, one of none and one without a place."""
    return {
        "rows": (
            Row("B", 3, 2, 0, 1), Row("E", 3, 0, 1, 0), Row("L", 3, 2, 1, -1),
            Row(TAG, length, queries, 2, 5), Row("C", 9, 3, 1, 2),
        ),
        "num_slots": 3, "capacity": length + 9,
    }  # fmt: skip


def with_idle_tokens(length: int, queries: int) -> dict:
    """The row with query tokens of no row, enough that no row is split at its segments."""
    return {**alone(length, queries), "idle_tokens": 8200}


def in_pages(length: int, queries: int) -> dict:
    """The row by itself in pages of 16 columns; any page may hold any sixteen of them."""
    return {**alone(length, queries), "page": 16}


def in_shifted_pages(length: int, queries: int) -> dict:
    """Its columns begin within a page, in company; columns come before heads in a page."""
    return {
        "rows": (Row("B", 3, 1, start=1), Row(TAG, length, queries, start=3)), "page": 16,
        "order": 1, "transposed": True, "padded": True, "exact_bounds": False,
    }  # fmt: skip


def in_small_pages(length: int, queries: int) -> dict:
    """The row in pages of five columns, between other rows."""
    return {
        "rows": (Row("B", 3, 1), Row(TAG, length, queries, start=2), Row("C", 7, 1, start=4)),
        "page": 5, "order": 2,
    }  # fmt: skip


def in_single_pages(length: int, queries: int) -> dict:
    """The row in pages of one column."""
    return {**alone(length, queries), "page": 1, "order": 3}


def in_large_pages(length: int, queries: int) -> dict:
    """The row in pages of 64 columns, from the second sixteen of one."""
    return {"rows": (Row(TAG, length, queries, start=16), Row("B", 5, 1)), "page": 64, "order": 4}


def in_pages_in_crowd(length: int, queries: int) -> dict:
    return {**in_crowd(length, queries), "page": 4, "order": 5}


def by_32_vectors(length: int, queries: int) -> dict:
    """The row in the kernel of compute capability 8 whose warps have 32 query vectors."""
    return {**alone(length, queries), "prefill": "mma32"}


def by_32_vectors_in_company(length: int, queries: int) -> dict:
    return {**in_mixed_company(length, queries), "prefill": "mma32"}


def by_32_vectors_in_pages(length: int, queries: int) -> dict:
    return {**in_small_pages(length, queries), "prefill": "mma32"}


SLOTS = alone, in_mixed_company, moved
# Their terms must equal those of the kernel whose warps have 16 vectors.
SLOTS_BY_32 = alone, by_32_vectors, by_32_vectors_in_company
PAGES_BY_32 = alone, by_32_vectors_in_pages
FEW_SLOTS = alone, in_company
# The first one runs in the kernel without pages; the terms of the others must equal its terms.
ALL_PAGES = alone, in_pages, in_shifted_pages, in_small_pages, in_single_pages, in_large_pages
FEW_PAGES = alone, in_pages, in_small_pages


@dataclasses.dataclass(frozen=True)
class Grid:
    """Lengths times query tokens times options, each in several places."""

    kernel: str
    base: Call
    lengths: Sequence[int]  # none: only cuts
    queries: Sequence[int] = (1,)
    options: Sequence[dict] = ({},)
    # Pairs of length and queries of calls that share positions, compared by CUT.
    cut: Sequence[tuple[int, int]] = ()
    places: Sequence = SLOTS

    @property
    def paged(self) -> bool:
        return any(place(16, 1).get("page") for place in self.places)

    @property
    def text(self) -> str:
        """All that the grid is."""
        names = [place.__name__ for place in self.places]
        return repr(dataclasses.replace(self, places=names))

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        queries = ", ".join(map(str, self.queries))
        heads = "/".join(map(str, self.base.heads))
        text = f"lengths {lengths}; query tokens {queries}; {heads} heads x {self.base.head_dim}"
        places = ", ".join(place.__name__.replace("_", " ") for place in self.places)
        return f"{text}; {len(self.options)} sets of options; {places}"


def attempt(prover: Prover, claims: Iterable[Claim], call: Call) -> Outcome | None:
    """A call's outcome; what the machine cannot follow counts against the claims."""
    try:
        return run(prover.ops, call)
    except (SymbolicError, AssertionError, NotImplementedError, RuntimeError) as finding:
        for claim in claims:
            claim.check(False, f"{type(finding).__name__}: {finding} ({call})")
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
        evidence = ""
        for left, right in zip(a.results[key], b.results[key], strict=True):
            # A call may return no lse.
            pair = next((pair for pair in zip(left, right, strict=False) if len({*pair}) > 1), None)
            if pair and not evidence:
                difference = prover.difference(*pair)
                evidence = f"token {key[1]}, head {key[2]}: {difference} ({what})"
        claim.check(not evidence, evidence)


def prove(prover: Prover, grids: Iterable[Grid]) -> None:
    """Runs a kernel's grids; a claim per statement."""
    for grid in grids:
        of_places = PAGES if grid.paged else BATCH
        claims = {
            statement: prover.claim(grid.kernel, statement, str(grid))
            for statement in ((HIDDEN, OUTSIDE, of_places) if grid.lengths else ())
        }
        for length, queries, options in itertools.product(grid.lengths, grid.queries, grid.options):
            if queries > length:
                continue
            first = None
            for place in grid.places:
                call = dataclasses.replace(grid.base, **place(length, queries), **options)
                outcome = attempt(prover, claims.values(), call)
                if outcome is None:
                    continue
                look(claims, call, outcome)
                if first:
                    same(prover, claims[of_places], first, outcome, f"first call and {call}")
                first = first or outcome
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
