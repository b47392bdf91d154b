"""The state machine of support/prefill_machine.py whose prompts wait for a rule; `make soak` has
those with processes."""

import hypothesis
from prefill_machine import PrefillMachine

PrefillMachine.TestCase.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=30, deadline=None
)
TestPrefillMachine = PrefillMachine.TestCase
