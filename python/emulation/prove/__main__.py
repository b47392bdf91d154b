"""`python -m emulation.prove`: the table of proofs, for every architecture of the library.

The exit status is 1 when a statement is refuted that is not known to be, one that is known to be is
not, an outcome of a branch is neither reached nor named, or a planted defect is not found. Nothing
is drawn at random: the same commit has the same table. A run that is interrupted goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from emulation.prove import branches, report, runs
from emulation.prove.claims import STATEMENTS, Prover, table
from emulation.prove.defects import DEFECTS, examine
from emulation.prove.everything import is_expected, prove_quick, units
from emulation.static.kernels import ARCHITECTURES, SOURCES


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="emulation.prove", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few lengths, as the test does")
    parser.add_argument("--branches", action="store_true", help="print every branch not reached")
    parser.add_argument(
        "--architecture", type=int, nargs="*", default=ARCHITECTURES, metavar="SM",
        help="(default: all of the library)",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="end then, and say how far it came"
    )
    parser.add_argument("--only", metavar="PATTERN", help="units whose names match")
    parser.add_argument("--fill", type=Path, help="write the table into this document")
    arguments = parser.parse_args()
    for statement, meaning in STATEMENTS.items():
        print(f"{statement}: {meaning}")
    unexpected = quickly(arguments.architecture) if arguments.quick else in_full(arguments)
    print("\nplanted defects")
    for defect, broken in DEFECTS.items():
        claims = examine(defect)
        print(*table(claims)[1:], sep="\n")
        refuted = {claim.statement for claim in claims if claim.evidence}
        unexpected += not refuted >= set(broken) or bool(refuted and not broken)
    print(f"\n{unexpected} verdicts that are not as expected")
    return int(unexpected > 0)


def quickly(architectures: Sequence[int]) -> int:
    """Prints the short proofs for sm_75 and sm_80; returns the number of unexpected verdicts."""
    unexpected = 0
    for architecture in (75, 80):
        if architecture in architectures:
            began = time.process_time()
            prover = prove_quick(Prover(architecture))
            print("", *table(prover.claims), sep="\n")
            seconds = time.process_time() - began
            print(f"{len(prover.terms.nodes)} terms, {seconds:.0f} CPU seconds")
            unexpected += sum(not is_expected(claim) for claim in prover.claims)
    return unexpected


def in_full(arguments: argparse.Namespace) -> int:
    """Runs all units and prints the table; the number of unexpected verdicts."""
    began = time.monotonic()
    runs.compile_all(arguments.architecture)
    jobs = list({
        (unit.name, first): (unit, first)
        for architecture in arguments.architecture
        for unit in units(architecture)
        if re.search(arguments.only or "", unit.name)
        for first in [runs.representative(unit.sources, architecture)]
    }.values())  # fmt: skip
    same = sharing(arguments.architecture)
    print("", *same, sep="\n")
    results = []
    for number, result in enumerate(runs.run(jobs, arguments.jobs, arguments.seconds), 1):
        results.append(result)
        wrong = sum(not is_expected(claim) for claim in result.claims)
        print(
            f"[{number}/{len(jobs)}, {time.monotonic() - began:.0f} s] sm_{result.architecture} "
            f"{result.unit.name}: {len(result.claims)} statements, {result.terms} terms, "
            f"{result.seconds:.0f} CPU s" + f", {wrong} NOT AS EXPECTED" * bool(wrong),
            flush=True,
        )
    place = {(unit.name, architecture): i for i, (unit, architecture) in enumerate(jobs)}
    results.sort(key=lambda result: place[result.unit.name, result.architecture])
    claims = [claim for result in results for claim in result.claims]
    print("", *table(claims), sep="\n")
    lines, unnamed = branches.summary(report.joined(results), arguments.branches)
    print("\noutcomes of conditional branches that these calls reach", *lines, sep="\n")
    seconds = sum(result.seconds for result in results)
    missing = [job for job in place if job not in {(x.unit.name, x.architecture) for x in results}]
    done = (
        f"{len(results)} of {len(jobs)} units, {sum(claim.checks for claim in claims)} checks, "
        f"{sum(result.terms for result in results)} terms, {seconds:.0f} CPU seconds, "
        f"commit {report.commit()}"
    )
    print(f"\n{done}")
    for name, architecture in missing:
        print(f"not run: sm_{architecture} {name}")
    if arguments.fill:
        text = [*report.markdown(claims), "", f"{done}.", "", *same, "", *report.evidence(claims)]
        report.fill(arguments.fill, [*text, "", *branches.markdown(report.joined(results))])
    return sum(not is_expected(claim) for claim in claims) + unnamed


def sharing(architectures: Sequence[int]) -> list[str]:
    """Lines that say, for each source, which architectures have the same PTX."""
    groups: dict[tuple[tuple[int, ...], ...], list[str]] = {}
    for path in SOURCES:
        by_first: dict[int, list[int]] = {}
        for architecture in architectures:
            first = runs.representative((path.stem,), architecture)
            by_first.setdefault(first, []).append(architecture)
        groups.setdefault(tuple(map(tuple, by_first.values())), []).append(path.stem)
    lines = []
    for of_architectures, stems in groups.items():
        text = "; ".join(
            "sm_" + ", ".join(map(str, group)) + (" alike" if len(group) > 1 else "")
            for group in of_architectures
        )
        lines.append(f"PTX of {', '.join(stems)}: {text}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
