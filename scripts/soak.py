"""The long versions of the random tests: hostile calls of the ops, operations of caches and relays.

    python scripts/soak.py hostile --calls 1000000 --seed 19
    python scripts/soak.py hostile --seed 19 --only 3624   # one call again
    python scripts/soak.py corpus                          # save a call of each kind anew
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
sys.path += [str(ROOT / "tests" / folder) for folder in ("support", "cache", "relay")]
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
    operations = commands.add_parser("operations", help="state machines of caches and relays")
    operations.add_argument("--operations", type=int, default=1_000_000)
    operations.add_argument("--faults", type=int, default=10_000, help="go on until so many")
    operations.add_argument("--machine", action="append", help="these (default: all, in turns)")
    for command in (hostile, corpus, operations):
        command.add_argument("--seed", type=int, default=SEED)
        command.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    started = time.monotonic()
    is_right = {
        "hostile": hostile_calls, "corpus": save_corpus, "operations": run_machines,
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


def machines() -> dict:
    """Every state machine, by name."""
    from relay_machine import RelayMachine
    from test_kv_cache_machine import MACHINES
    from test_prefill_machine import PrefillMachine

    return {**MACHINES, "relay": RelayMachine, "relay, prefill elsewhere": PrefillMachine}


def run_machines(arguments: argparse.Namespace) -> bool:
    """Runs shards of the machines in turns; shard n of a machine has the seed `seed + n`."""
    import hypothesis
    import torch
    from hypothesis.stateful import invariant, run_state_machine_as_test
    from relay_machine import INJECTED

    torch.set_num_threads(1)
    chosen = {k: v for k, v in machines().items() if k in (arguments.machine or machines())}
    done, wrong, shard = dict.fromkeys(chosen, 0), [], 0
    end = time.monotonic() + arguments.seconds
    # Each shard is a new search: nothing that Hypothesis has learned in another steers it.
    settings = hypothesis.settings(
        max_examples=10, stateful_step_count=50, deadline=None, database=None,
        suppress_health_check=list(hypothesis.HealthCheck), print_blob=False,
    )  # fmt: skip

    def is_over() -> bool:
        enough = sum(done.values()) >= arguments.operations
        return (enough and INJECTED.total() >= arguments.faults) or (
            arguments.seconds > 0 and time.monotonic() > end
        )

    while not is_over():
        for name, machine in chosen.items():

            def count(self, name=name):
                done[name] += 1

            counted = type(machine.__name__, (machine,), {"count": invariant()(count)})
            try:
                run_state_machine_as_test(
                    hypothesis.seed(arguments.seed + shard)(counted), settings=settings
                )
            except Exception as error:
                wrong.append(f"{name}, seed {arguments.seed + shard}: {error!r}")
        shard += 1
        print(
            f"  {sum(done.values()):,} operations, {len(wrong)} wrong", file=sys.stderr, flush=True
        )
    print(
        f"operations, seeds {arguments.seed} to {arguments.seed + shard - 1}: "
        f"{sum(done.values()):,} made, {INJECTED.total():,} faults, {len(wrong)} shards wrong"
    )
    for name, number in done.items():
        print(f"  {name}: {number:,} operations")
    print("  faults: " + ", ".join(f"{kind} {n:,}" for kind, n in INJECTED.most_common()))
    for what in wrong:
        print(f"  {what}")
    return not wrong


if __name__ == "__main__":
    main()
