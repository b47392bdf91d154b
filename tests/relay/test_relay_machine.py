"""The state machine of support/relay_machine.py, on a relay that prefills in its own loop."""

import hypothesis
from relay_machine import RelayMachine

RelayMachine.TestCase.settings = hypothesis.settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    # The time for drawing depends on the machine's other load, not on this test.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
TestRelayMachine = RelayMachine.TestCase
