"""Idle work of each policy on one small workload, computed by hand.

Prompts of 4, 2 and 3 tokens, answers of 3, 5 and 2, two slots. A forward takes one second per
token of its longest row.
"""

import pytest

from baton_engines import policies
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


class Clock:
    """A clock that only the model advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(policy: str, **options) -> tuple[Relay, list[list[float]]]:
    model, clock = FakeLlama(), Clock()

    def work(rows):
        clock.now += max(model.forwards[-1])

    model.fault = work
    relay = Relay(model, 2, 32, policies.get(policy, **options), clock=clock)
    queries = [relay.submit([n] * n, max_new_tokens=m) for n, m in ((4, 3), (2, 5), (3, 2))]
    relay.run()
    for query in queries:
        assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens)
    return relay, [list(query.token_times) for query in queries]


def test_orca():
    # A and B prefill until 4; steps until 5 and 6, A is done; C prefills until 9 while B decodes; a
    # step until 10.
    relay, times = run("orca")
    assert times == [[4, 5, 6], [4, 5, 6, 9, 10], [9, 10]]
    counters = relay.counters
    assert (counters.steps, counters.slot_steps, counters.active_slot_steps) == (4, 8, 8)
    assert (counters.prefill_seconds, counters.decode_seconds) == (4, 6)
    assert (counters.joint_seconds, counters.prefill_stall) == (3, 0)
    # The forward until 9: three tokens of C and one of B, none of them padding.
    assert (counters.joint_tokens, counters.joint_padding_tokens) == (4, 0)
    assert (counters.columns_read, counters.cache_padding_read) == (6 + 8 + 10 + 8 + 10, 0)
    assert (counters.prompt_tokens, counters.output_tokens) == (9, 10)


def test_padded_orca():
    relay, times = run("padded_orca")
    assert times == [[4, 5, 6], [4, 5, 6, 9, 10], [9, 10]]
    counters = relay.counters
    # The first prefill is 2 x 4 with 2 of padding, the shared forward 2 x 3 with 2 of padding.
    assert relay._batch.slots.model.padding == [2, 0, 0, 2, 0]
    assert (counters.joint_tokens, counters.joint_padding_tokens) == (14, 4)
    assert counters.joint_padding == 4 / 14
    assert (counters.columns_read, counters.padding_columns_read) == (46, 4)
    assert (counters.prompt_tokens, counters.output_tokens) == (9, 10)
    assert (counters.slot_idle, counters.prefill_stall) == (0, 0)


def test_chunked():
    # 3 of A until 3; the last of A and both of B until 5; steps until 6 and 7, A is done; 2 of C
    # with B until 9, the last of C until 10, B is done; C by itself until 11.
    relay, times = run("chunked", token_budget=3)
    assert times == [[5, 6, 7], [5, 6, 7, 9, 10], [10, 11]]
    counters = relay.counters
    assert (counters.steps, counters.slot_steps, counters.active_slot_steps) == (5, 10, 9)
    assert (counters.prefill_seconds, counters.decode_seconds) == (5, 6)
    assert (counters.joint_seconds, counters.prefill_stall) == (3, 0)
    assert (counters.joint_tokens, counters.joint_padding_tokens) == (5, 0)
    assert (counters.prompt_tokens, counters.prefills) == (9, 3)


def test_baton_apart_with_a_bound_on_the_stall():
    # A and B until 4, steps until 5 and 6; 2 of C until 8 and a step of B until 9; the last of C
    # until 10 and a step of both until 11.
    relay, times = run("baton", max_stall_tokens=2, join="never")
    assert times == [[4, 5, 6], [4, 5, 6, 9, 11], [10, 11]]
    counters = relay.counters
    # C computes in its slot between the steps at 6 and 9, so the slot is not idle.
    assert (counters.steps, counters.slot_steps, counters.active_slot_steps) == (4, 8, 8)
    assert (counters.prefill_seconds, counters.decode_seconds) == (7, 4)
    assert counters.prefill_stall == 3 / (2 * 11)
    assert (counters.joint_seconds, counters.joint_tokens) == (0, 0)
    assert (counters.prompt_tokens, counters.prefills) == (9, 3)


def test_baton_joins():
    # As with orca: everything fits in a forward while nothing is known about the costs.
    relay, times = run("baton")
    assert times == [[4, 5, 6], [4, 5, 6, 9, 10], [9, 10]]
    assert (relay.counters.slot_idle, relay.counters.prefill_stall) == (0, 0)
    # As with chunked, if decoders wait for at most two prompt tokens: 2 of C with B until 8, the
    # last of C until 9; a step of both until 10.
    relay, times = run("baton", max_stall_tokens=2)
    assert times == [[4, 5, 6], [4, 5, 6, 8, 9], [9, 10]]
    assert relay.counters.joint_tokens == 3 + 2


@pytest.mark.parametrize("policy", ["run_to_completion", "multi_bin"])
def test_batches_that_run_to_completion(policy):
    # A and B until 4, steps until 5, 6, 7, 8; C until 11 and a step until 12.
    options = {"bins": 1} if policy == "multi_bin" else {}
    relay, times = run(policy, **options)
    assert times == [[4, 5, 6], [4, 5, 6, 7, 8], [11, 12]]
    counters = relay.counters
    assert (counters.steps, counters.slot_steps, counters.active_slot_steps) == (5, 10, 7)
    assert (counters.prefill_stall, counters.joint_tokens) == (0, 0)


@pytest.mark.parametrize("bound", [1, 7, 1000])
def test_the_stall_between_two_steps_is_bounded(bound):
    model = FakeLlama()
    relay = Relay(model, 4, 200, policies.get("baton", max_stall_tokens=bound, join="never"))
    apart, longest = 0, 0

    def watch(rows):
        nonlocal apart, longest
        decoders = [query for query in relay.running if query.tokens]
        if not decoders or decoders[0].prompt + decoders[0].tokens in rows:
            apart = 0
        else:
            apart += sum(model.forwards[-1])
            longest = max(longest, apart)

    model.fault = watch
    prompts = [1 + 37 * i % 90 for i in range(30)]
    for i, length in enumerate(prompts):
        relay.submit([i] * length, max_new_tokens=1 + i % 9)
    relay.run()
    assert relay.counters.prompt_tokens == sum(prompts)
    # Reached, but never exceeded; without a bound several prompts are computed at once.
    assert longest == bound if bound < 1000 else longest > max(prompts)
