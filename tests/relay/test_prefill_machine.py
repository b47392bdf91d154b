"""The relay's state machine with prompts that are computed elsewhere, late or not at all."""

import os
import signal

import hypothesis
import policy_settings
from faulty_llama import DIE, INJECTED, RAISE
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from relay_machine import BYTES_PER_TOKEN, CAPACITY, PROMPTS, RelayMachine

from baton_engines import policies
from baton_engines.prefill.apart import Apart
from baton_engines.relay import Relay
from baton_engines.testing.prefill import ManualPrefiller


class PrefillMachine(RelayMachine):
    """Jobs end when a rule says so, or when the loop has nothing else to do; some fail."""

    @initialize(
        settings=st.sampled_from(policies.NAMES).flatmap(
            lambda name: policy_settings.settings(name, CAPACITY, BYTES_PER_TOKEN)
        ),
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

    @initialize(
        settings=st.sampled_from(policies.NAMES).flatmap(
            lambda name: policy_settings.settings(name, CAPACITY, BYTES_PER_TOKEN)
        ),
        always=st.booleans(),
        workers=st.integers(1, 2),
    )
    def start(self, settings, always, workers):
        super().start(settings, None)
        # Long enough for any busy machine: the test is not about how long it takes.
        self.prefill = Apart(workers, 1, always, timeout=7200, start_timeout=7200)
        self.relay = Relay(self.model, capacity=CAPACITY, prefill=self.prefill, **settings)
        policy_settings.watch_budget(self.relay, settings["kv_budget"])

    @rule(prompt=PROMPTS, count=st.integers(1, 10), first=st.sampled_from([RAISE] * 9 + [DIE]))
    def submit_failing_elsewhere(self, prompt, count, first):
        self.add([first, *prompt], max_new_tokens=count)

    @rule(chosen=st.integers(0, 9))
    def kill_a_process(self, chosen):
        processes = self.prefill.process_ids
        if chosen < len(processes):
            INJECTED["prefill process, killed"] += 1
            os.kill(processes[chosen], signal.SIGKILL)

    def teardown(self):
        if not hasattr(self, "relay"):
            return
        try:
            super().teardown()
            INJECTED["prefill process"] += self.relay.counters.prefill_faults
        finally:
            self.relay.close()
        assert self.prefill.process_ids == []


PrefillMachine.TestCase.settings = hypothesis.settings(
    max_examples=100, stateful_step_count=30, deadline=None
)
TestPrefillMachine = PrefillMachine.TestCase
