"""A byte budget for keys and values, and a number of slots that follows the load."""

import pytest
from policy_settings import watch_budget
from relay_checks import assert_right, prompt

from baton_engines import policies
from baton_engines.policies import Forward, Plan, Policy, View
from baton_engines.relay import Query, Relay
from baton_engines.relay.autoscale import Autoscale
from baton_engines.testing import FakeLlama

BYTES_PER_TOKEN = 256


@pytest.fixture
def model() -> FakeLlama:
    return FakeLlama()


class Eager(Policy):
    """Admits a query whenever there is a row, so only the relay keeps the budget."""

    name = "eager"

    def plan(self, view: View) -> Plan:
        newcomers = tuple(view.waiting)[: view.num_free]
        prefill = tuple((q, q.prompt_left) for q in (*view.running, *newcomers) if q.prompt_left)
        return Plan(admit=newcomers, forwards=(Forward(prefill), Forward(decode=True)))


@pytest.mark.parametrize(
    ("policy", "aligned"),
    [("baton", False), ("baton", True), ("chunked", False), ("eager", False), ("eager", True)],
)
def test_the_youngest_is_parked_and_goes_on_without_recomputing(model, policy, aligned):
    made = Eager() if policy == "eager" else policy
    budget = 50 * BYTES_PER_TOKEN
    relay = Relay(model, 4, 48, made, aligned=aligned, kv_budget=budget)
    watch_budget(relay, budget)
    parked_ids, parked_bytes = set(), []

    def look(relay):
        parked = [query for query in relay.waiting if query.cached]
        parked_ids.update(query.id for query in parked)
        parked_bytes.append(relay.parked_bytes)
        assert relay.parked_bytes == sum(query.cached for query in parked) * BYTES_PER_TOKEN
        # The oldest query never leaves its row.
        assert not relay.running or min(q.id for q in queries if not q.ended) in {
            query.id for query in relay.running
        }

    queries = [relay.submit(prompt(3 + i, i), max_new_tokens=40) for i in range(5)]
    assert relay.run(progress=look) == queries
    assert_right(model, queries)
    assert parked_ids and 0 not in parked_ids
    counters = relay.counters
    assert counters.preemptions == counters.insertions >= len(parked_ids)
    assert 40 * BYTES_PER_TOKEN < counters.peak_kv_bytes <= budget
    assert counters.peak_parked_bytes == max(parked_bytes) > 0
    assert relay.parked_bytes == relay.cache.bytes_committed == 0
    # Every token is computed once.
    computed = sum(map(sum, model.forwards))
    needed = sum(len(query.prompt) + len(query.tokens) - 1 for query in queries)
    assert computed == needed


def test_what_is_copied_to_host_memory_and_back_is_counted(model):
    relay = Relay(model, 2, 32)
    query = relay.submit(prompt(5), max_new_tokens=9)
    relay.step()
    relay.step()
    relay.preempt(query)
    # The five prompt tokens and the first generated one; the second has no keys yet.
    assert relay.parked_bytes == relay.counters.peak_parked_bytes == 6 * BYTES_PER_TOKEN
    relay.resume(query)
    relay.run()
    assert relay.parked_bytes == 0
    assert relay.counters.parking_bytes == 2 * 6 * BYTES_PER_TOKEN
    relay.preempt(relay.submit(prompt(5), max_new_tokens=9))
    assert relay.parked_bytes == 0


@pytest.mark.parametrize("policy", policies.NAMES)
def test_what_never_fits_the_budget_fails_alone(model, policy):
    relay = Relay(model, 4, 64, policy, kv_budget=20 * BYTES_PER_TOKEN)
    # The last token needs no keys: 16 + 5 - 1 is 20.
    fits, not_quite = (relay.submit(prompt(n), max_new_tokens=5) for n in (16, 17))
    also_fits = relay.submit(prompt(3), max_new_tokens=18)
    assert not_quite.status == "failed"
    assert str(not_quite.error) == (
        "Relay.submit: prompt + max_new_tokens must fit the KV budget of 5120 bytes, "
        "got 17 + 5 with up to 5376 bytes"
    )
    relay.run()
    assert_right(model, [fits, also_fits])
    assert relay.counters.peak_kv_bytes == 20 * BYTES_PER_TOKEN


@pytest.mark.parametrize("policy", policies.NAMES)
def test_a_budget_too_small_for_any_query_fails_all_of_them(model, policy):
    relay = Relay(model, 4, 64, policy, kv_budget=BYTES_PER_TOKEN - 1)
    queries = [relay.submit(prompt(1 + i), max_new_tokens=1 + i) for i in range(20)]
    assert relay.run() == queries and model.forwards == []
    assert (relay.counters.failed, relay.counters.submitted) == (20, 20)
    assert all("must fit the KV budget of 255 bytes" in str(query.error) for query in queries)
    assert relay.cache.bytes_committed == 0


class WrongVictim(Eager):
    name = "wrong"

    def victim(self, running):
        return Query(0, 0.0)


def test_a_victim_that_does_not_run_is_an_error(model):
    relay = Relay(model, 2, 32, WrongVictim(), kv_budget=30 * BYTES_PER_TOKEN)
    for _ in range(2):
        relay.submit(prompt(16), max_new_tokens=8)
    with pytest.raises(ValueError, match="victim of wrong must be a running query, got <Query 0"):
        relay.run()
    relay.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_budget": 0}, "Relay: kv_budget must be at least 1, got 0"),
        ({"max_slots": 3}, "Relay: max_slots must be at least 4, got 3"),
        ({"shaping": "concatenate"}, "Relay: aligned must be True for shaping 'concatenate'"),
        ({"shaping": "x"}, "Relay: shaping must be one of in_place, concatenate, got 'x'"),
    ],
)
def test_settings_that_make_no_sense(model, options, message):
    with pytest.raises(ValueError, match=message):
        Relay(model, 4, 32, **options)


def test_slots_grow_at_once_and_shrink_after_a_while():
    scale = Autoscale(2, 20, patience=3)
    assert scale.wanted(2, running=0, waiting=2) == 2
    assert scale.wanted(2, running=2, waiting=1) == 4
    assert scale.wanted(2, running=2, waiting=7) == 9
    assert scale.wanted(8, running=8, waiting=99) == 20
    assert scale.wanted(20, running=20, waiting=99) == 20
    # One row is free while others run, so more rows would not help.
    assert scale.wanted(8, running=7, waiting=99) == 8
    # A batch that runs to completion ends before the next, larger one.
    assert scale.wanted(8, running=0, waiting=12) == 16
    assert [scale.wanted(16, running=5, waiting=3) for _ in range(3)] == [16, 16, 8]
    assert [scale.wanted(8, running=n, waiting=0) for n in (4, 4, 5, 4, 4, 4)] == [8] * 5 + [4]
    assert [scale.wanted(3, running=1, waiting=0) for _ in range(4)] == [3, 3, 2, 3]
    assert [scale.wanted(2, running=1, waiting=0) for _ in range(9)] == [2] * 9


@pytest.mark.parametrize("policy", policies.NAMES)
def test_the_number_of_slots_follows_the_load(model, policy):
    # With several bins, other batches would wait while it runs.
    made = policies.get(policy, **({"bins": 1} if policy == "multi_bin" else {}))
    relay = Relay(model, 2, 64, made, max_slots=9)
    reserved = relay.cache.bytes_reserved
    crowd = [relay.submit(prompt(4, i), max_new_tokens=3 + i % 4) for i in range(30)]
    # A single remaining query does not need nine slots.
    last = relay.submit(prompt(4, 99), max_new_tokens=58)
    relay.step()
    assert relay.num_slots == len(relay.running) == 9
    assert relay.cache.bytes_reserved > reserved
    sizes = []
    while relay.step():
        if relay.num_slots not in sizes:
            sizes.append(relay.num_slots)
    assert sizes == [9, 4, 2]
    assert_right(model, [*crowd, last])
    assert relay.num_slots == 2
    assert (relay.cache.bytes_reserved, relay.cache.bytes_committed) == (reserved, 0)
    assert relay.counters.resizes >= 2


def test_memory_is_back_after_the_last_query_was_cancelled_between_two_steps(model):
    relay = Relay(model, 2, 32, max_slots=4)
    queries = [relay.submit(prompt(3), max_new_tokens=9) for _ in range(4)]
    relay.step()
    assert relay.num_slots == 4 and relay.cache.bytes_committed > 0
    for query in queries:
        relay.cancel(query)
    assert relay.step() is False
    assert (relay.num_slots, relay.cache.bytes_committed) == (2, 0)


def test_slots_that_cannot_be_had_are_done_without(model):
    relay = Relay(model, 2, 32, max_slots=8)

    def refuse(num_slots):
        raise MemoryError("no more")

    relay.cache.resize = refuse
    queries = [relay.submit(prompt(3, i), max_new_tokens=4) for i in range(6)]
    relay.step()
    assert relay.num_slots == len(relay.running) == 2
    del relay.cache.resize
    relay.run()
    assert_right(model, queries)
