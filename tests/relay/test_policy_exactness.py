"""Every policy, with any options, gives a query the logits that it gets by itself: random arrivals,
lengths, priorities, budgets and cancels on a small Llama in float32, compared with the unpatched
transformers model."""

import functools

import hypothesis
import policy_settings
import pytest
import torch
from hypothesis import strategies as st

from baton_engines import policies
from baton_engines.llama import patch_llama
from baton_engines.relay import Relay
from baton_engines.testing.recorded_graphs import RecordedGraphs
from baton_engines.testing.small_llama import VOCAB_SIZE, small_llama

CAPACITY = 40
# Two layers, keys and values of two heads of 16 in float32.
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4


@functools.cache
def model():
    return small_llama(max_position_embeddings=64)


@functools.cache
def alone(tokens: tuple[int, ...]) -> torch.Tensor:
    """float32 [tokens, vocab], computed by the unpatched model."""
    with torch.inference_mode():
        return model()(torch.tensor([tokens])).logits[0]


ARRIVAL = st.tuples(
    st.integers(0, 12),  # the step before which it is submitted
    st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=20),
    st.integers(1, 20),  # tokens of the answer
    st.integers(0, 3),  # priority
    st.none() | st.integers(1, 30),  # the step after which it is cancelled
)


def check(settings: dict, arrivals: list[tuple], more_to_come: bool) -> None:
    logits: dict[int, list[torch.Tensor]] = {}
    with patch_llama(model()) as llama, Relay(llama, capacity=CAPACITY, **settings) as relay:
        assert relay.cache.bytes_per_token == BYTES_PER_TOKEN
        policy_settings.watch_budget(relay, settings["kv_budget"])
        relay._batch.on_logits = lambda query, row: logits.setdefault(query.id, []).append(row)
        queries, cancels = [], {}
        coming = sorted(arrivals, key=lambda arrival: arrival[0])
        step = 0
        while coming:
            while coming and coming[0][0] <= step:
                _, prompt, count, priority, cancel = coming.pop(0)
                query = relay.submit(prompt, max_new_tokens=count, priority=priority, eos=None)
                queries.append(query)
                cancels[query] = cancel
            relay.more_to_come = more_to_come and bool(coming)
            relay.step()
            step += 1
            for query in [query for query in queries if cancels[query] == step]:
                relay.cancel(query)
        relay.run()
        assert relay.cache.bytes_committed == relay.parked_bytes == 0
        assert relay.num_slots == settings["num_slots"]
        if settings["kv_budget"] is not None:
            assert 0 < relay.counters.peak_kv_bytes <= settings["kv_budget"]
    for query in queries:
        assert query.status == "finished" or (query.status, cancels[query]) != ("cancelled", None)
        assert query.status == "cancelled" or len(query.tokens) == query.max_new_tokens
        if query.tokens:
            expected = alone(tuple(query.prompt + query.tokens[:-1]))[len(query.prompt) - 1 :]
            own = torch.stack(logits[query.id])
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
            # Two logits may be closer to each other than the two models' rounding errors.
            assert query.tokens == own.argmax(-1).tolist()


@pytest.mark.parametrize("policy", policies.NAMES)
@hypothesis.settings(
    max_examples=15,
    deadline=None,
    # The time for drawing depends on the machine's other load, not on this test.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
@hypothesis.given(data=st.data())
def test_logits_are_those_of_each_query_alone(policy, data):
    settings = data.draw(policy_settings.settings(policy, CAPACITY, BYTES_PER_TOKEN))
    if settings["shaping"] == "in_place" and data.draw(st.booleans()):
        settings["cuda_graphs"] = RecordedGraphs()
    arrivals = data.draw(st.lists(ARRIVAL, min_size=1, max_size=10))
    check(settings, arrivals, data.draw(st.booleans()))


def test_budgets_make_policies_preempt():
    """The property above is also tested under preemption: two long answers in a tight budget."""
    made = policies.get("baton", max_stall_tokens=3)
    budget = 45 * BYTES_PER_TOKEN
    settings = {"policy": made, "num_slots": 3, "kv_budget": budget}
    with patch_llama(model()) as llama, Relay(llama, capacity=CAPACITY, **settings) as relay:
        queries = [relay.submit([i, 2, 3], max_new_tokens=36) for i in range(3)]
        relay.run()
        assert relay.counters.preemptions >= 1
        assert relay.counters.preemptions == relay.counters.insertions
        assert relay.counters.peak_parked_bytes > 0
        # Nothing was computed twice: each of the prompts' tokens, and all of the answers' except
        # the last, which is not an input.
        assert relay.counters.prompt_tokens == 9
        assert [len(query.tokens) for query in queries] == [36] * 3
