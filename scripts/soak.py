"""The long versions of the random tests: hostile calls of the ops, rows in any call, operations of
caches and relays.

    python scripts/soak.py hostile --calls 1000000 --seed 19
    python scripts/soak.py hostile --seed 19 --only 3624   # one call again
    python scripts/soak.py corpus                          # save a call of each kind anew
    python scripts/soak.py equality --cases 20000 --seed 19
    python scripts/soak.py operations --operations 1000000 --seed 19

Everything that is drawn depends on the seed, which is printed with what was done; the exit status
is 1 where something was wrong. `--seconds` ends a run early: it says how far it came. Run from a
checkout: the generators and the state machines are those of the tests.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "support"))
SEED = 19


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    hostile = commands.add_parser("hostile", help="random calls of torch.ops.baton_kernels")
    hostile.add_argument("--calls", type=int, default=1_000_000)
    hostile.add_argument("--begin", type=int, default=0, help="number of the first call")
    hostile.add_argument("--saved", action="store_true", help="the calls of the corpus")
    hostile.add_argument("--only", type=int, nargs="+", help="these calls")
    hostile.add_argument("--plant", action="store_true", help="with each planted defect in turn")
    corpus = commands.add_parser("corpus", help="save the first call of each kind of outcome")
    corpus.add_argument("--calls", type=int, default=20_000)
    equality = commands.add_parser("equality", help="the bits of rows in other calls, on the CPU")
    equality.add_argument("--cases", type=int, default=20_000)
    equality.add_argument("--begin", type=int, default=0, help="number of the first case")
    equality.add_argument("--only", type=int, nargs="+", help="these cases")
    operations = commands.add_parser("operations", help="state machines of caches and relays")
    operations.add_argument("--operations", type=int, default=1_000_000)
    operations.add_argument("--faults", type=int, default=0, help="go on until then")
    operations.add_argument("--begin", type=int, default=0, help="number of the first shard")
    operations.add_argument("--machine", action="append", help="this one (default: all)")
    operations.add_argument("--examples", type=int, default=40, help="of a machine in a shard")
    operations.add_argument("--jobs", type=int, default=1, help="processes")
    for command in (hostile, corpus, equality, operations):
        command.add_argument("--seed", type=int, default=SEED)
        command.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    started = time.monotonic()
    is_right = {
        "hostile": hostile_calls, "corpus": save_corpus, "equality": compare_rows,
        "operations": run_machines,
    }[arguments.command](arguments)  # fmt: skip
    print(f"{time.monotonic() - started:.0f} s")
    sys.exit(not is_right)


def hostile_calls(arguments: argparse.Namespace) -> bool:
    """Makes the calls and prints what came of them."""
    import hostile_defects
    import hostile_run

    seed, indices = arguments.seed, list(range(arguments.begin, arguments.begin + arguments.calls))
    if arguments.saved:
        seed, indices = hostile_run.corpus()
    if arguments.only:
        indices = arguments.only
    if arguments.plant:
        planted = []
        for defect in hostile_defects.DEFECTS:
            with hostile_defects.planted(defect):
                print(f"planted: {defect}")
                planted.append(print_report(seed, hostile_run.run(seed, indices)))
        return all(planted)

    def say(report: hostile_run.Report) -> None:
        print(f"  {report.calls:,} calls, {len(report.wrong)} wrong", file=sys.stderr, flush=True)

    return print_report(seed, hostile_run.run(seed, indices, arguments.seconds, say))


def print_report(seed: int, report: Any) -> bool:
    """True where nothing was wrong."""
    print(
        f"hostile calls, seed {seed}: {report.calls:,} made, {report.accepted:,} accepted, "
        f"{len(report.outcomes):,} kinds of outcome, {report.deaths} processes died, "
        f"{len(report.wrong)} calls wrong"
    )
    for index, what in report.wrong[:50]:
        print(f"  call {index}: {what}")
    return not report.wrong


def save_corpus(arguments: argparse.Namespace) -> bool:
    """Writes the numbers of the calls that were the first of their kind."""
    import hostile_run

    report = hostile_run.run(arguments.seed, list(range(arguments.calls)), arguments.seconds)
    indices = sorted(set(report.first.values()))
    lines = [" ".join(map(str, indices[i : i + 15])) for i in range(0, len(indices), 15)]
    hostile_run.CORPUS.write_text(
        "# The seed of hostile_calls.draw_call, then the first call of each kind of outcome.\n"
        "# Written by `python scripts/soak.py corpus`.\n"
        + "\n".join([str(arguments.seed), *lines])
        + "\n"
    )
    print(f"{len(indices)} calls of {report.calls:,} in {hostile_run.CORPUS}")
    return not report.wrong


def compare_rows(arguments: argparse.Namespace) -> bool:
    """Compares rows in other calls and prints how many."""
    import equality_run

    def say(report: equality_run.Report) -> None:
        print(f"  {report.cases:,} cases, {len(report.wrong)} wrong", file=sys.stderr, flush=True)

    cases = range(arguments.begin, arguments.begin + arguments.cases)
    report = equality_run.run(arguments.seed, arguments.only or cases, arguments.seconds, say)
    print(
        f"equality, seed {arguments.seed}: {report.cases:,} cases, {report.rows.total():,} rows, "
        f"{len(report.wrong)} wrong"
    )
    print("  rows: " + ", ".join(f"{name} {n:,}" for name, n in report.rows.most_common()))
    for number, what in report.wrong[:50]:
        print(f"  case {number}: {what}")
    return not report.wrong


def run_machines(arguments: argparse.Namespace) -> bool:
    """Runs shards of the state machines and prints what came of them."""
    import machine_run

    def say(report: machine_run.Report) -> None:
        print(
            f"  {report.operations.total():,} operations, {report.faults.total():,} faults, "
            f"{len(report.wrong)} wrong",
            file=sys.stderr, flush=True,
        )  # fmt: skip

    report = machine_run.run(
        arguments.seed, arguments.operations, arguments.faults, names=arguments.machine,
        begin=arguments.begin, examples=arguments.examples, seconds=arguments.seconds,
        jobs=arguments.jobs, say=say,
    )  # fmt: skip
    print(
        f"operations, seed {arguments.seed}: {report.operations.total():,} made in "
        f"{report.shards} shards, {report.faults.total():,} faults injected, "
        f"{len(report.wrong)} wrong"
    )
    for name, number in report.operations.items():
        print(f"  {name}: {number:,} operations")
    for what, counts in (
        ("operations", report.rules), ("what came of them", report.events),
        ("faults", report.faults),
    ):  # fmt: skip
        print(f"  {what}: " + ", ".join(f"{kind} {n:,}" for kind, n in counts.most_common()))
    for what in report.wrong:
        print(f"  {what}")
    return not report.wrong


if __name__ == "__main__":
    main()
