"""Several answers to one prompt: the prompt is computed once, and answers are as for single
queries."""

import pytest
from relay_checks import assert_empty

from baton_engines import Relay
from baton_engines.policies import NAMES
from baton_engines.testing import FakeLlama
from baton_engines.testing.small_llama import small_llama

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OPTIONS = {"temperature": 1.2, "max_new_tokens": 6, "eos": None}


def alone(model, seed: int, prompt=PROMPT, **options) -> list[int]:
    relay = Relay(model, 1, 24)
    query = relay.submit(prompt, seed=seed, **{**OPTIONS, **options})
    relay.run()
    return query.result()


def assert_as_if_alone(model, queries, seed: int, **options) -> None:
    for index, query in enumerate(queries):
        assert query.result() == alone(model, seed + index, query.prompt, **options)
    assert len({tuple(query.tokens) for query in queries}) > 1


# An aligned cache takes whole prompts only: test_policies.py tests that it refuses `chunked`.
@pytest.mark.parametrize(
    ("layout", "policy"),
    [("ragged", name) for name in NAMES]
    + [("aligned", name) for name in NAMES if name != "chunked"],
)
@pytest.mark.parametrize("num_slots", [2, 5, 8])
def test_answers_are_as_if_alone(policy, layout, num_slots):
    aligned = layout == "aligned"
    model = FakeLlama()
    relay = Relay(model, num_slots, 24, policy, aligned=aligned)
    other = relay.submit([7, 7], **OPTIONS)
    queries = relay.submit_n(PROMPT, 5, seed=40, **OPTIONS)
    relay.run()
    assert_as_if_alone(model, queries, 40)
    assert other.result() == alone(model, other.id, [7, 7])
    assert relay.counters.prompt_tokens == 2 + len(PROMPT)
    assert_empty(relay)
    assert relay.parked_bytes == 0


def test_rows_are_copied_inside_the_cache_while_the_first_query_runs(monkeypatch):
    model = FakeLlama()
    relay = Relay(model, 4, 24)
    copied = []
    copy_row = relay.cache.copy_row
    monkeypatch.setattr(
        relay.cache, "copy_row", lambda *a, **k: copied.append(a) or copy_row(*a, **k)
    )
    queries = relay.submit_n(PROMPT, 4, seed=1, **OPTIONS)
    relay.run()
    assert len(copied) == 3 and relay.counters.parking_bytes == 0
    assert_as_if_alone(model, queries, 1)


def test_real_logits_have_the_same_bits():
    model = small_llama()
    with Relay(model, 3, 24) as relay:
        seen = {}
        relay._batch.on_logits = lambda query, logits: seen.setdefault(query.id, []).append(logits)
        queries = relay.submit_n(PROMPT, 3, max_new_tokens=4, eos=None)
        relay.run()
    for query in queries:
        assert query.tokens == queries[0].tokens
        for own, first in zip(seen[query.id], seen[queries[0].id], strict=True):
            assert own.equal(first)


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("action", ["cancel", "preempt"])
def test_the_first_query_leaves(when, action):
    model = FakeLlama()
    relay = Relay(model, 2, 24)
    blocker = relay.submit([9], **{**OPTIONS, "max_new_tokens": 20})
    queries = relay.submit_n(PROMPT, 4, seed=7, **OPTIONS)
    for _ in range({"before": 0, "during": 1, "after": 3}[when]):
        relay.step()
    getattr(relay, action)(queries[0])
    relay.run()
    assert_as_if_alone(model, queries[1:], 8)
    if action == "preempt":
        relay.resume(queries[0])
        relay.run()
        assert queries[0].result() == alone(model, 7)
    assert blocker.status == "finished"
    assert_empty(relay)
    assert relay.parked_bytes == 0


def test_others_leave_before_they_have_entered():
    model = FakeLlama()
    relay = Relay(model, 1, 24)
    queries = relay.submit_n(PROMPT, 4, seed=7, **OPTIONS)
    relay.step()
    relay.preempt(queries[1])
    relay.cancel(queries[2])
    relay.run()
    assert queries[3].result() == alone(model, 10)
    relay.resume(queries[1])
    relay.run()
    assert queries[1].result() == alone(model, 8)
    assert_empty(relay)
    assert relay.parked_bytes == 0


def test_a_first_query_that_fails_leaves_the_prompt_to_the_next():
    model = FakeLlama()
    relay = Relay(model, 3, 24)
    queries = relay.submit_n(PROMPT, 3, seed=2, **OPTIONS)
    failures = []

    def fault(rows):
        if not failures:
            failures.append(rows)
            raise RuntimeError("once")

    model.fault = fault
    relay.run()
    assert queries[0].status == "failed"
    assert_as_if_alone(model, queries[1:], 3)


def test_no_memory_to_keep_the_prompt(monkeypatch):
    model = FakeLlama()
    relay = Relay(model, 1, 24)
    queries = relay.submit_n(PROMPT, 3, seed=2, **OPTIONS)

    def extract(*_, **__):
        raise MemoryError("no more")

    monkeypatch.setattr(relay.cache, "extract", extract)
    relay.run()
    assert queries[0].result() == alone(model, 2)
    for query in queries[1:]:
        assert "insertion of query" in str(query.error) and "no more" in str(query.error)
    assert_empty(relay)


@pytest.mark.parametrize("prefill", ["serial", "overlapped"])
def test_where_the_prompt_is_computed_does_not_matter(prefill):
    model = FakeLlama()
    relay = Relay(model, 3, 24, prefill=prefill)
    relay.submit([1, 2], **OPTIONS)
    relay.step()
    queries = relay.submit_n(PROMPT, 4, seed=5, **OPTIONS)
    relay.run()
    assert_as_if_alone(model, queries, 5)
    relay.close()


def test_a_budget_is_kept():
    model = FakeLlama()
    per_token = Relay(model, 1, 1).cache.bytes_per_token
    budget = 20 * per_token
    relay = Relay(model, 4, 24, kv_budget=budget)
    queries = relay.submit_n(PROMPT, 4, seed=5, **OPTIONS)
    while relay.step():
        assert relay.cache.bytes_in_use <= budget
    assert_as_if_alone(model, queries, 5)
    assert relay.parked_bytes == 0


def test_prompts_of_one_token_and_single_answers():
    model = FakeLlama()
    relay = Relay(model, 2, 24)
    queries = relay.submit_n([3], 3, seed=5, **OPTIONS) + relay.submit_n([3], 1, seed=5, **OPTIONS)
    relay.run()
    assert_as_if_alone(model, queries[:3], 5)
    assert queries[3].tokens == queries[0].tokens


def test_bad_counts():
    relay = Relay(FakeLlama(), 2, 24)
    with pytest.raises(ValueError, match="submit_n: n must be at least 1, got 0"):
        relay.submit_n(PROMPT, 0)
    with pytest.raises(TypeError, match="submit_n: n must be an integer"):
        relay.submit_n(PROMPT, 1.5)
    queries = relay.submit_n([], 3)
    assert [query.status for query in queries] == ["failed"] * 3
