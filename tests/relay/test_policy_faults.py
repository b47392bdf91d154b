"""Faults, counted, under every policy: other queries finish right and memory is released."""

import gc
import random
import weakref

import pytest

from baton_engines import policies
from baton_engines.relay import Query, Relay
from baton_engines.testing import FakeLlama

POISON = 49
BYTES_PER_TOKEN = 256


def assert_right(model: FakeLlama, query: Query) -> None:
    assert query.status == "finished", (query, query.error)
    assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens)


def assert_memory_is_back(relay: Relay, reserved: int) -> None:
    assert (relay.waiting, relay.running, relay.parked) == ((), (), ())
    assert relay.cache.bytes_in_use == relay.cache.bytes_committed == relay.parked_bytes == 0
    assert relay.cache.bytes_reserved == reserved


@pytest.mark.parametrize("policy", policies.NAMES)
def test_prefills_that_raise(policy):
    model = FakeLlama()

    def fault(rows):
        if any(tokens[0] == POISON for tokens in rows):
            raise RuntimeError("the prefill broke")

    model.fault = fault
    relay = Relay(model, 4, 48, policy)
    reserved = relay.cache.bytes_reserved
    numbers = random.Random(1)
    good, bad = [], []
    for i in range(120):
        prompt = [numbers.randrange(POISON) for _ in range(numbers.randint(1, 20))]
        count = numbers.randint(1, 20)
        if i % 3 == 1:
            bad.append(relay.submit([POISON, *prompt], max_new_tokens=count))
        else:
            good.append(relay.submit(prompt, max_new_tokens=count))
    relay.run()
    for query in bad:
        assert query.status == "failed" and query.tokens == []
        assert f"forward of query {query.id} must not raise" in str(query.error)
        assert "the prefill broke" in str(query.error)
    for query in good:
        assert_right(model, query)
    assert (relay.counters.failed, relay.counters.finished) == (40, 80)
    assert relay.counters.prefills == 80
    assert_memory_is_back(relay, reserved)


SETTINGS = {
    "baton": ({"max_stall_tokens": 8, "admission": "priority"}, 4000),
    "chunked": ({"token_budget": 16, "admission": "priority"}, 1000),
    "multi_bin": ({"bins": 3}, 1000),
    "orca": ({"admission": "shortest"}, 1000),
    "padded_orca": ({"admission": "length_aware"}, 1000),
    "run_to_completion": ({}, 1000),
}


@pytest.mark.parametrize(
    "policy, prefill",
    [*((policy, "serial") for policy in SETTINGS), ("baton", "overlapped")],
)
def test_cancels_at_random_moments(policy, prefill):
    """Cancelled while waiting, running, parked by hand or by the budget, between steps and from
    callbacks within one, with the prompt at a worker or its result in flight; every tenth stays."""
    options, num_cancels = SETTINGS[policy]
    model = FakeLlama()
    relay = Relay(
        model,
        8,
        40,
        policies.get(policy, **options),
        kv_budget=150 * BYTES_PER_TOKEN,
        max_slots=12,
        prefill=prefill,
    )
    reserved = relay.cache.bytes_reserved
    numbers = random.Random(7)
    doomed: list[Query] = []
    kept: list[Query] = []
    cancelled = 0
    where: dict[str, int] = {}
    ghosts: list[weakref.ref] = []

    def cancel_one() -> None:
        nonlocal cancelled
        while doomed and cancelled < num_cancels:
            query = doomed.pop(numbers.randrange(len(doomed)))
            status = query.status
            if relay.cancel(query):
                cancelled += 1
                where[status] = where.get(status, 0) + 1
                return

    def on_token(query, token):
        if numbers.random() < 0.3:
            cancel_one()

    def submit() -> None:
        prompt = [numbers.randrange(POISON) for _ in range(numbers.randint(1, 16))]
        query = relay.submit(
            prompt,
            max_new_tokens=numbers.randint(1, 24),
            priority=numbers.randint(0, 3),
            on_token=on_token,
        )
        stays = query.id % 10 == 0
        (kept if stays else doomed).append(query)
        if not stays:
            ghosts.append(weakref.ref(query))

    while cancelled < num_cancels:
        while len(relay.waiting) + len(relay.running) + len(relay.parked) < 40:
            submit()
        if relay.running and numbers.random() < 0.2:
            relay.preempt(numbers.choice(relay.running))
        if len(relay.parked) > 6:
            relay.resume(relay.parked[0])
        for _ in range(numbers.randrange(8)):
            cancel_one()
        relay.step()
        doomed = [query for query in doomed if not query.ended]
    for query in relay.parked:
        relay.resume(query)
    relay.run()
    for query in kept:
        assert_right(model, query)
    assert relay.counters.cancelled == cancelled == num_cancels
    assert relay.counters.finished + cancelled == relay.counters.submitted
    assert len(kept) >= num_cancels // 20
    assert set(where) == {"waiting", "running", "parked"}
    assert relay.counters.peak_kv_bytes <= 150 * BYTES_PER_TOKEN
    assert relay.counters.preemptions > 0
    assert_memory_is_back(relay, reserved)
    assert (relay.counters.prefills_elsewhere > 0) == (prefill != "serial")
    relay.close()
    # Nothing refers to the cancelled queries any more.
    doomed.clear()
    gc.collect()
    assert not any(ghost() for ghost in ghosts)
