"""Runs the state machines of caches and relays in shards that a seed determines.

Shard n of a machine is a separate search with seed + n, independent of what Hypothesis learned in
other shards, so a single shard can be repeated.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import multiprocessing
import time
from collections.abc import Callable

import hypothesis
import torch
from faulty_llama import INJECTED
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test

PROCESSES = "relay, prefill in processes"
# A killed worker takes seconds to start again, so few shards run this machine.
EVERY_SHARDS = 25
EXAMPLES, STEPS = 10, 50  # of a machine in a shard


def machines() -> dict[str, type[RuleBasedStateMachine]]:
    """Every state machine, by name. Those of emulated kernels run in `make test` only."""
    from relay_machine import RelayMachine
    from test_kv_cache_machine import MACHINES
    from test_prefill_machine import PrefillMachine, ProcessMachine

    return {
        **MACHINES,
        "relay": RelayMachine,
        "relay, prefill elsewhere": PrefillMachine,
        PROCESSES: ProcessMachine,
    }


@dataclasses.dataclass
class Report:
    """The results of shards: operations by machine, faults by kind, and what was wrong."""

    shards: int = 0
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        self.shards += other.shards
        self.operations += other.operations
        self.faults += other.faults
        self.wrong += other.wrong


def run_shard(
    seed: int, names: list[str], examples: int = EXAMPLES, *, shrinks: bool = True
) -> Report:
    """One search by each of these machines; an error is reported in its shortest form."""
    torch.set_num_threads(1)
    report = Report(shards=1)
    before = INJECTED.copy()
    for name in names:
        settings = hypothesis.settings(
            max_examples=1 if name == PROCESSES else examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[
                hypothesis.Phase.generate,
                *[hypothesis.Phase.shrink] * (shrinks and name != PROCESSES),
            ],
        )
        try:
            run_state_machine_as_test(
                hypothesis.seed(seed)(counted(machines()[name], name, report.operations)),
                settings=settings,
            )
        except Exception as error:
            steps = "\n".join(getattr(error, "__notes__", []))
            report.wrong.append(f"{name}, seed {seed}: {error!r}\n{steps}")
    report.faults = INJECTED - before
    return report


def counted(machine, name: str, operations: collections.Counter[str]):
    """The machine, counting the rules that it runs."""

    class Counted(machine):
        def __init__(self):
            # Checks before the first rule do not count as an operation.
            operations[name] -= 1
            super().__init__()

        @invariant()
        def count(self):
            operations[name] += 1

    Counted.__name__ = machine.__name__
    return Counted


def run(
    seed: int,
    operations: int,
    faults: int = 0,
    *,
    names: list[str] | None = None,
    begin: int = 0,
    examples: int = EXAMPLES,
    seconds: float = 0.0,
    jobs: int = 1,
    say: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Runs shards from number `begin` on until this many operations and faults have been done.

    Args:
        names: of machines; None means all.
        examples: per machine and shard.
        seconds: ends the run early; 0 does not.
        jobs: the number of processes.
        say: called with the results so far after every shard.
    """
    names = names or list(machines())
    end = time.monotonic() + seconds if seconds else float("inf")
    total, shard = Report(), begin

    def is_over() -> bool:
        enough = total.operations.total() >= operations and total.faults.total() >= faults
        return enough or bool(total.wrong) or time.monotonic() > end

    # Spawned, because a relay's workers and torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        pending: set[concurrent.futures.Future[Report]] = set()
        while pending or not is_over():
            while len(pending) < jobs and not is_over():
                mine = [
                    name for name in names
                    if name != PROCESSES or len(names) == 1 or shard % EVERY_SHARDS == 0
                ]  # fmt: skip
                pending.add(pool.submit(run_shard, seed + shard, mine, examples))
                shard += 1
            done, pending = concurrent.futures.wait(
                pending, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                total.add(future.result())
                say(total)
    return total
