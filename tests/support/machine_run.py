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

import cache_machines
import hypothesis
import paged_machine
import torch
from counted import EVENTS, OPERATIONS
from faulty_llama import INJECTED
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from prefill_machine import HAS_RAY, ActorMachine, PrefillMachine, ProcessMachine
from relay_machine import RelayMachine

PROCESSES, ACTORS = "relay, prefill in processes", "relay, prefill by actors of Ray"
# Examples and steps of a machine in a shard. Hypothesis begins with the simplest example, which is
# always the same.
EXAMPLES, STEPS = 40, 50
# A killed worker takes seconds to start again, so these machines have one example besides the
# simplest, in shard 0 and then in every second or fifth one.
EVERY_SHARDS = {PROCESSES: 2, ACTORS: 5}


def machines() -> dict[str, type[RuleBasedStateMachine]]:
    """Every state machine, by name. Those of emulated kernels run in `make test` only."""
    found = {
        **cache_machines.MACHINES,
        **paged_machine.MACHINES,
        "relay": RelayMachine,
        "relay, prefill elsewhere": PrefillMachine,
        PROCESSES: ProcessMachine,
    }
    return {**found, ACTORS: ActorMachine} if HAS_RAY else found


@dataclasses.dataclass
class Report:
    """The results of shards: operations by machine and by rule, events that they led to, faults by
    kind, and what was wrong."""

    shards: int = 0
    operations: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    rules: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    events: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Report) -> None:
        self.shards += other.shards
        self.operations += other.operations
        self.rules += other.rules
        self.events += other.events
        self.faults += other.faults
        self.wrong += other.wrong


def run_shard(
    seed: int, names: list[str], examples: int = EXAMPLES, *, shrinks: bool = True
) -> Report:
    """One search by each of these machines; an error is reported in its shortest form."""
    torch.set_num_threads(1)
    report = Report(shards=1)
    counts = OPERATIONS, EVENTS, INJECTED
    before = [count.copy() for count in counts]
    for name in names:
        earlier = OPERATIONS.total()
        settings = hypothesis.settings(
            max_examples=2 if name in EVERY_SHARDS else examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[
                hypothesis.Phase.generate,
                *[hypothesis.Phase.shrink] * (shrinks and name not in EVERY_SHARDS),
            ],
        )
        try:
            # A new class, because the seed is kept in it.
            machine = type(machines()[name].__name__, (machines()[name],), {})
            run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=settings)
        except Exception as error:
            steps = "\n".join(getattr(error, "__notes__", []))
            report.wrong.append(f"{name}, seed {seed}: {error!r}\n{steps}")
        report.operations[name] = OPERATIONS.total() - earlier
    report.rules, report.events, report.faults = (
        count - then for count, then in zip(counts, before, strict=True)
    )
    return report


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
                    if len(names) == 1 or shard % EVERY_SHARDS.get(name, 1) == 0
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
