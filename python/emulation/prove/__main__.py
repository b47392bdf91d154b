"""`python -m emulation.prove [--quick] [--branches] [--architecture 75 80]`: the table of proofs.

The exit status is 1 when a statement is refuted that is not known to be, one that is known to be is
not, or a planted defect is not found.
"""

from __future__ import annotations

import argparse
import sys
import time

from emulation.prove.claims import STATEMENTS, Prover, table
from emulation.prove.defects import DEFECTS, examine
from emulation.prove.everything import is_expected, prove_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="emulation.prove", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few lengths, as the test does")
    parser.add_argument("--branches", action="store_true", help="print every branch not reached")
    parser.add_argument("--architecture", type=int, nargs="*", default=[75, 80], metavar="SM")
    arguments = parser.parse_args()
    for statement, meaning in STATEMENTS.items():
        print(f"{statement}: {meaning}")
    unexpected = 0
    for architecture in arguments.architecture:
        began = time.process_time()
        prover = prove_all(Prover(architecture), arguments.quick)
        print("", *table(prover.claims), sep="\n")
        print(f"{len(prover.terms.nodes)} terms, {time.process_time() - began:.0f} CPU seconds")
        unexpected += sum(not is_expected(claim) for claim in prover.claims)
        print("\noutcomes of conditional branches that these calls reach")
        for kernel, coverage in sorted(prover.coverage.items()):
            reached, count = coverage.counts
            print(f"{kernel:40} {architecture:>3} {reached:>4} of {count}")
            for line in coverage.unreached() if arguments.branches else ():
                print(f"{'':8}{line}")
    print("\nplanted defects")
    for defect, broken in DEFECTS.items():
        claims = examine(defect)
        print(*table(claims)[1:], sep="\n")
        refuted = {claim.statement for claim in claims if claim.evidence}
        unexpected += not refuted >= set(broken) or bool(refuted and not broken)
    print(f"\n{unexpected} verdicts that are not as expected")
    return int(unexpected > 0)


if __name__ == "__main__":
    sys.exit(main())
