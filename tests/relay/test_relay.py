"""The relay on a model without weights: who runs when, which faults stay local, what is
measured."""

import gc
import itertools
import weakref

import pytest
import torch
from relay_checks import assert_empty, assert_right, prompt

from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama

LAYOUTS = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
POLICIES = pytest.mark.parametrize("policy", ["baton", "run_to_completion"])


@pytest.fixture
def model() -> FakeLlama:
    return FakeLlama()


@LAYOUTS
@POLICIES
def test_every_query_gets_the_answer_that_it_gets_alone(model, policy, aligned):
    relay = Relay(model, 3, 48, policy, aligned=aligned)
    queries = [
        relay.submit(prompt(1 + i * 7 % 30), max_new_tokens=1 + i * 5 % 17) for i in range(14)
    ]
    late = []

    def arrive(_):
        if len(late) < 6:
            late.append(relay.submit(prompt(3 + len(late), 1), max_new_tokens=4))

    assert relay.run(progress=arrive) == queries + late
    assert_right(model, queries + late)
    assert_empty(relay)


def test_the_defaults_come_from_the_model():
    model = FakeLlama(vocab_size=1000, max_positions=40)
    model.model.generation_config = type("Config", (), {"eos_token_id": None})
    answer = model.decode_alone([1, 2], 10)
    model.model.config.eos_token_id = answer[6]
    relay = Relay(model)
    assert (relay.num_slots, relay.cache.shape.capacity) == (16, 40)
    plain, never, other, several = (
        relay.submit([1, 2], max_new_tokens=10, **options)
        for options in ({}, {"eos": None}, {"eos": answer[2]}, {"eos": (answer[4], 999)})
    )
    assert relay.submit([1], max_new_tokens=40).status == "failed"
    relay.run()
    assert (plain.tokens, plain.finish_reason) == (answer[:7], "eos")
    assert (never.tokens, never.finish_reason) == (answer, "length")
    assert (other.tokens, several.tokens) == (answer[:3], answer[:5])


def test_a_finished_query_hands_its_slot_over_between_two_steps(model):
    relay = Relay(model, 2, 32)
    short, long = relay.submit([1], max_new_tokens=2), relay.submit([2], max_new_tokens=9)
    newcomer = relay.submit([3, 4], max_new_tokens=3)
    assert relay.step() and relay.step()
    assert (short.status, long.slot, newcomer.status) == ("finished", 1, "waiting")
    assert relay.step()
    assert (newcomer.slot, len(newcomer.tokens), len(long.tokens)) == (0, 1, 3)
    # Packed: two prompts of 1; two decoders; the newcomer's prompt and the remaining decoder.
    assert model.forwards == [(1, 1), (1, 1), (2, 1)]
    relay.run()
    assert_right(model, [short, long, newcomer])


def test_run_to_completion_waits_for_the_last_query_of_a_batch(model):
    relay = Relay(model, 2, 32, "run_to_completion")
    short, long = relay.submit([1], max_new_tokens=2), relay.submit([2], max_new_tokens=5)
    newcomer = relay.submit([3], max_new_tokens=2)
    while not long.ended:
        assert newcomer.status == "waiting"
        relay.step()
    assert short.finished < long.finished
    relay.run()
    assert_right(model, [short, long, newcomer])
    # Steps with 2, 1, 1, 1 and 1 active of 2 slots.
    assert relay.counters.slot_idle == 1 - 6 / 10


def test_prompts_share_a_prefill_up_to_a_bound(model):
    from baton_engines.policies import get

    relay = Relay(model, 8, 64, get("baton", max_prefill_tokens=10, join="never"))
    queries = [relay.submit(prompt(n), max_new_tokens=2) for n in (4, 6, 1, 30, 9, 2)]
    relay.step()
    assert model.forwards == [(4, 6), (1,), (30,), (9,), (2,), (1,) * 6]
    relay.run()
    assert_right(model, queries)


BAD_SUBMISSIONS = {
    "empty": ([], {}, ValueError, "token_ids must hold at least one token"),
    "outside": ([1, 50], {}, ValueError, r"in the vocabulary \[0, 50\), got 50 at index 1"),
    "negative": ([-1], {}, ValueError, "got -1 at index 0"),
    "text": ("hello", {}, TypeError, "token_ids must be integers, got text 'hello'"),
    "floats": ([1.5], {}, TypeError, "token_ids must be a sequence of integers"),
    "nested": (torch.ones(1, 2).int(), {}, TypeError, "token_ids must be a sequence of integers"),
    "none": (None, {}, TypeError, "token_ids must be a sequence of integers"),
    "too_long": ([1] * 20, {"max_new_tokens": 13}, ValueError, r"capacity 32, got 20 \+ 13 = 33"),
    "no_tokens": ([1], {"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
    "half_token": ([1], {"max_new_tokens": 1.5}, TypeError, "max_new_tokens must be an integer"),
    "temperature": ([1], {"temperature": -1}, ValueError, "temperature must be finite and >= 0"),
    "nan": ([1], {"temperature": float("nan")}, ValueError, "temperature must be finite"),
    "top_p": ([1], {"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
    "top_k": ([1], {"top_k": -1}, ValueError, "top_k must be >= 0, got -1"),
    "top_k_type": ([1], {"top_k": 2.5}, TypeError, "top_k must be an integer"),
    "seed": ([1], {"seed": -1}, ValueError, "seed must be in"),
    "stop_text": ([1], {"stop": "x"}, ValueError, "stop must be token ids when .* no tokenizer"),
    "stop_empty": ([1], {"stop": [[]]}, ValueError, "stop must hold .* not empty"),
    "stop_type": ([1], {"stop": [[1.5]]}, TypeError, "stop must be made of token ids"),
    "eos": ([1], {"eos": "x"}, TypeError, "eos must be made of token ids"),
    "callback": ([1], {"on_token": 3}, TypeError, "on_token must be callable, got 3"),
}


@pytest.mark.parametrize("case", BAD_SUBMISSIONS)
def test_a_bad_query_fails_at_submission_and_alone(model, case):
    token_ids, options, error, text = BAD_SUBMISSIONS[case]
    relay = Relay(model, 2, 32)
    good = relay.submit([1, 2], max_new_tokens=3)
    bad = relay.submit(token_ids, **{"max_new_tokens": 3, **options})
    assert (bad.status, bad.finish_reason, bad.tokens) == ("failed", "error", [])
    with pytest.raises(error, match=text):
        bad.result()
    assert str(bad.error).startswith("Relay.submit: ")
    with pytest.raises(error):
        next(relay.stream(bad))
    also_good = relay.submit(torch.tensor([3, 4]), max_new_tokens=3)
    assert relay.run() == [good, bad, also_good]
    assert_right(model, [good, also_good])
    assert_empty(relay)


def test_what_fits_exactly_runs(model):
    relay = Relay(model, 1, 8)
    query = relay.submit(prompt(5), max_new_tokens=3)
    relay.run()
    assert_right(model, [query])


@POLICIES
@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_raising_callback_fails_its_query_alone(model, policy, at):
    relay = Relay(model, 3, 32, policy)

    def raising(query, token):
        if len(query.tokens) == at + 1:
            raise ValueError("boom")

    queries = [
        relay.submit(prompt(3, i), max_new_tokens=5, on_token=raising if i == 1 else None)
        for i in range(5)
    ]
    assert relay.run() == queries
    bad = queries.pop(1)
    assert (bad.status, len(bad.tokens)) == ("failed", at + 1)
    assert "on_token of query 1 must not raise, got ValueError('boom')" in str(bad.error)
    assert isinstance(bad.error.__cause__, ValueError)
    # No frame, and so no tensor of a step, is kept alive by an error.
    assert bad.error.__traceback__ is bad.error.__cause__.__traceback__ is None
    assert_right(model, queries)
    assert_empty(relay)


@LAYOUTS
def test_a_failing_prefill_fails_the_culprit_alone(model, aligned):
    def fault(rows):
        if any(13 in tokens[:1] for tokens in rows):
            raise RuntimeError("out of luck")

    model.fault = fault
    relay = Relay(model, 4, 32, aligned=aligned)
    first = relay.submit([1, 2, 3], max_new_tokens=12)
    relay.step()
    group = [relay.submit([n, 1], max_new_tokens=4) for n in (5, 13, 7)]
    relay.step()
    bad = group.pop(1)
    assert bad.status == "failed"
    assert "forward of query 2 must not raise, got RuntimeError('out of luck')" in str(bad.error)
    assert relay.cache.shape.num_free == 1
    relay.run()
    assert_right(model, [first, *group])
    assert_empty(relay)


@LAYOUTS
def test_a_failing_decode_fails_the_culprit_alone(model, aligned):
    answer = model.decode_alone([9], 5)

    def fault(rows):
        if any(tokens == [9, *answer[:3]] for tokens in rows):
            raise RuntimeError("bad row")

    model.fault = fault
    relay = Relay(model, 4, 32, aligned=aligned)
    queries = [relay.submit([n], max_new_tokens=6) for n in (8, 9, 10)]
    relay.run()
    bad = queries.pop(1)
    assert (bad.status, bad.tokens) == ("failed", answer[:3])
    assert_right(model, queries)
    assert_empty(relay)


@LAYOUTS
def test_a_forward_that_fails_for_no_reason_of_a_query_costs_nothing(model, aligned):
    def fault(rows):
        if len(rows) > 1:
            raise MemoryError("only one at a time")

    model.fault = fault
    relay = Relay(model, 4, 32, aligned=aligned)
    queries = [relay.submit(prompt(1 + i, i), max_new_tokens=4) for i in range(6)]
    relay.run()
    assert_right(model, queries)


def test_logits_that_are_not_finite_fail_their_query_alone(model):
    answer = model.decode_alone([9], 2)
    model.bad_row = lambda tokens: tokens == [9, *answer]
    relay = Relay(model, 4, 32)
    queries = [
        relay.submit([n], max_new_tokens=6, temperature=t) for n, t in ((8, 0), (9, 0), (10, 0))
    ]
    relay.run()
    bad = queries.pop(1)
    assert (bad.status, bad.tokens) == ("failed", answer)
    assert isinstance(bad.error, FloatingPointError)
    assert "logits of query 1 must be finite, got NaN or infinity" in str(bad.error)
    assert_right(model, queries)
    assert_empty(relay)


def test_tokens_stream_while_others_go_on(model):
    relay = Relay(model, 2, 32)
    first, other = (relay.submit(prompt(3, i), max_new_tokens=6 - i) for i in range(2))
    stream = relay.stream(first)
    taken = list(itertools.islice(stream, 3))
    assert taken == first.tokens[:3] and not first.ended
    assert taken + list(stream) == model.decode_alone(first.prompt, 6)
    assert_right(model, [first, other])
    assert list(relay.stream(first)) == first.tokens
    parked = relay.submit([1], max_new_tokens=5)
    stream = relay.stream(parked)
    next(stream)
    relay.preempt(parked)
    with pytest.raises(RuntimeError, match="query 2 must be resumed"):
        list(stream)


def test_a_query_that_has_not_ended_has_no_result(model):
    relay = Relay(model, 2, 32)
    query = relay.submit([1], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="query 0 must have ended, got status 'waiting'"):
        query.result()
    relay.run()
    assert query.result() == query.tokens == model.decode_alone([1], 2)
    assert repr(query) == "<Query 0 finished, 1 prompt + 2 tokens>"


def test_run_returns_every_query_once(model):
    relay = Relay(model, 2, 32)
    assert relay.run() == [] and relay.step() is False
    refused_id = relay.submit([]).id
    relay.submit([1], max_new_tokens=2)
    assert [query.id for query in relay.run()] == [refused_id, 1]
    held = relay.submit([1], max_new_tokens=2)
    while relay.step():
        pass
    assert relay.run() == [held] and relay.run() == []


def test_an_interrupted_run_can_be_taken_up_again(model):
    relay = Relay(model, 2, 32)
    queries = [relay.submit([i], max_new_tokens=3) for i in range(5)]

    def stop(relay):
        if relay.counters.steps == 3:
            raise KeyError("enough")

    with pytest.raises(KeyError):
        relay.run(progress=stop)
    assert relay.run() == queries
    assert_right(model, queries)


def test_a_closed_relay_has_let_go_of_everything(model):
    with Relay(model, 2, 32) as relay:
        queries = [relay.submit([i], max_new_tokens=9) for i in range(5)]
        relay.step()
        relay.preempt(queries[0])
        relay.step()
    assert [query.status for query in queries] == ["cancelled"] * 5
    assert_empty(relay)
    assert relay.step() is False
    with pytest.raises(RuntimeError, match="relay must be open"):
        relay.submit([1])
    relay.close()


def test_nothing_grows_with_the_number_of_queries_served(model):
    relay = Relay(model, 4, 16)
    alive = weakref.WeakSet()

    def serve(count):
        for _ in range(count):
            alive.add(relay.submit([1, 2], max_new_tokens=2, on_token=lambda *_: None))
            alive.add(relay.submit([]))
            relay.step()
        while relay.step():
            pass
        relay.step()

    serve(60)
    gc.collect()
    assert len(alive) == 0
    assert_empty(relay)
    histogram = relay.counters.time_per_token
    assert histogram.count == 60
    assert len(histogram._buckets) == len(Relay(model, 1, 8).counters.time_per_token._buckets)


def test_an_ended_query_keeps_results_only(model):
    relay = Relay(model, 2, 16)
    held = object()

    class Callback:
        def __call__(self, *_):
            assert held

    callback = Callback()
    gone = weakref.ref(callback)
    query = relay.submit([1], max_new_tokens=3, temperature=1.0, on_token=callback)
    relay.run()
    del callback
    gc.collect()
    assert gone() is None
    assert query.parked_kv is None
    with pytest.raises(
        RuntimeError, match="Query.serving: query 0 must be served, got status .finished"
    ):
        _ = query.serving
