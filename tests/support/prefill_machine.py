"""The relay's state machine with prompts that are computed elsewhere, late or not at all."""

import importlib.util
import os
import signal
import sys

import policy_settings
from counted import rule
from faulty_llama import DIE, INJECTED, RAISE
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from processes import alive, wait_until
from relay_machine import CAPACITY, PROMPTS, RelayMachine, any_settings

from baton_engines.prefill.apart import Apart
from baton_engines.relay import Relay
from baton_engines.testing.prefill import ManualPrefiller

# Long enough for any busy machine: the test is not about how long processes take.
PATIENT = {"timeout": 7200, "start_timeout": 7200}
# Whether there can be an ActorMachine.
HAS_RAY = importlib.util.find_spec("ray") is not None


class PrefillMachine(RelayMachine):
    """Jobs end when a rule says so, or when the loop has nothing else to do; some fail."""

    @initialize(
        settings=any_settings(),
        always=st.booleans(),
        workers=st.integers(1, 2),
        faults=st.lists(st.booleans(), max_size=12),
    )
    def start(self, settings, always, workers, faults):
        super().start(settings, None)
        self.prefill = ManualPrefiller(workers, always)
        self.prefill.fault = self.prefill_fault
        self.faults = list(faults)
        self.relay = Relay(self.model, capacity=CAPACITY, prefill=self.prefill, **settings)
        policy_settings.watch_budget(self.relay, settings["kv_budget"])

    def prefill_fault(self):
        if self.faults and self.faults.pop():
            INJECTED["prefill"] += 1
            raise OSError("worker")

    @rule(count=st.integers(1, 3))
    def compute_elsewhere(self, count):
        self.prefill.compute(count)

    @invariant()
    def who_is_away_holds_an_empty_row(self):
        if not hasattr(self, "relay"):
            return
        away = [query for query in self.queries if query in self.relay._loop.in_flight]
        for query in away:
            assert query.status == "running" and query.tokens == [] and query.cached == 0
            assert self.relay.cache.shape.length(query.slot) == 0

    def teardown(self):
        super().teardown()
        if hasattr(self, "relay"):
            assert not self.relay._loop.in_flight
            self.relay.close()


class ProcessMachine(RelayMachine):
    """Prompts are computed by real processes, which raise, end during a job, or are killed.

    Only `make soak` runs it, because a process takes seconds to start again.
    """

    kind = "prefill process"

    @initialize(settings=any_settings(), always=st.booleans(), workers=st.integers(1, 2))
    def start(self, settings, always, workers):
        # First, so that a start that fails leaves nothing to tear down.
        self.prefill = self.new_prefiller(workers, always)
        super().start(settings, None)
        self.relay = Relay(self.model, capacity=CAPACITY, prefill=self.prefill, **settings)
        policy_settings.watch_budget(self.relay, settings["kv_budget"])

    def new_prefiller(self, workers, always):
        return Apart(workers, 1, always, **PATIENT)

    @rule(prompt=PROMPTS, count=st.integers(1, 10), first=st.sampled_from([RAISE] * 9 + [DIE]))
    def submit_failing_elsewhere(self, prompt, count, first):
        self.add([first, *prompt], max_new_tokens=count)

    @rule(chosen=st.integers(0, 2))
    def kill_a_process(self, chosen):
        INJECTED[f"{self.kind}, killed"] += self.kill(chosen)

    def kill(self, chosen):
        """Kills one of the processes, unless the number is too high; whether it did."""
        processes = self.prefill.process_ids
        if chosen < len(processes):
            os.kill(processes[chosen], signal.SIGKILL)
        return chosen < len(processes)

    def teardown(self):
        if not hasattr(self, "relay"):
            return
        try:
            super().teardown()
            INJECTED[self.kind] += self.relay.counters.prefill_faults
        finally:
            self.end()

    def end(self):
        self.relay.close()
        assert self.prefill.process_ids == []


class ActorMachine(ProcessMachine):
    """The processes are actors of Ray, on a cluster of this example's own."""

    kind = "Ray actor"

    def new_prefiller(self, workers, always):
        # Ray is a large package: not before a machine needs it.
        from baton_engines.prefill.ray import Remote

        os.environ.update(
            RAY_USAGE_STATS_ENABLED="0",
            # Else everything else on the machine comes before its actors.
            RAY_worker_niceness="0",
            # Actors have to find the model's module, and those that it imports.
            PYTHONPATH=os.pathsep.join(filter(None, sys.path)),
        )
        self.start_cluster()
        return Remote(workers=workers, threads=1, always=always, num_cpus=0, **PATIENT)

    def start_cluster(self):
        """Starts Ray again if its parts start too late, as they may while other work runs."""
        import ray

        for attempt in range(3):
            try:
                ray.init(
                    "local", num_cpus=1, object_store_memory=80 * 2**20, include_dashboard=False,
                    logging_level="ERROR", log_to_driver=False,
                )  # fmt: skip
                return
            except Exception as error:
                ray.shutdown()
                if attempt == 2 or "timed out during startup" not in str(error):
                    raise

    def kill(self, chosen):
        import ray

        actors = self.prefill._actors._all
        if chosen < len(actors):
            ray.kill(actors[chosen], no_restart=False)
        return chosen < len(actors)

    def end(self):
        import ray

        try:
            self.relay.close()
            processes = self.prefill.process_ids
            wait_until(lambda: not any(map(alive, processes)), f"one of {processes} is left")
        finally:
            ray.shutdown()
