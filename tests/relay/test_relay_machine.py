"""The state machine of support/relay_machine.py, on a relay that prefills in its own loop."""

import hypothesis
from relay_machine import RelayMachine

RelayMachine.TestCase.settings = hypothesis.settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    # How long it takes to draw is the machine's other load, not this test.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
TestRelayMachine = RelayMachine.TestCase
