"""The relay's controls, used between steps and from callbacks: cancel, preempt, resume, resize."""

import random

import pytest
from relay_checks import assert_empty, assert_right, prompt

from baton_engines import policies
from baton_engines.relay import Query, Relay
from baton_engines.testing import FakeLlama

LAYOUTS = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])


@pytest.fixture
def model() -> FakeLlama:
    return FakeLlama()


def computed_tokens(model: FakeLlama) -> int:
    return sum(sum(counts) for counts in model.forwards)


@LAYOUTS
def test_cancel_in_every_status(model, aligned):
    relay = Relay(model, 2, 32, aligned=aligned)
    running, other, waiting, parked = (
        relay.submit(prompt(4, i), max_new_tokens=9) for i in range(4)
    )
    relay.preempt(parked)
    relay.step()
    assert [q.status for q in (running, waiting, parked)] == ["running", "waiting", "parked"]
    for query in (running, waiting, parked):
        assert relay.cancel(query) is True
        assert (query.status, query.finish_reason) == ("cancelled", "cancelled")
        assert relay.cancel(query) is False
        assert relay.preempt(query) is False and relay.resume(query) is False
    assert running.result() == model.decode_alone(running.prompt, 1)
    assert relay.cache.shape.num_free == 1
    relay.run()
    assert_right(model, [other])
    assert_empty(relay)


def test_a_query_of_another_relay_is_refused(model):
    relay, other = Relay(model, 2, 32), Relay(model, 2, 32)
    query = other.submit([1], max_new_tokens=4)
    for lever in (relay.cancel, relay.preempt, relay.resume):
        with pytest.raises(ValueError, match="query must be one of this relay's"):
            lever(query)


@LAYOUTS
def test_a_preempted_query_goes_on_without_recomputing(model, aligned):
    relay = Relay(model, 2, 32, aligned=aligned)
    queries = [relay.submit(prompt(5 + i, i), max_new_tokens=6 + i) for i in range(3)]
    relay.step()
    victim = queries[0]
    assert relay.preempt(victim) is True
    assert (victim.status, victim.slot, victim.cached) == ("parked", None, 5)
    assert relay.preempt(victim) is False
    relay.step()
    assert queries[2].status == "running" and len(victim.tokens) == 1
    assert relay.resume(victim) is True and victim.status == "waiting"
    assert relay.resume(victim) is False
    relay.run()
    assert_right(model, queries)
    # Every token once: the last token of a query is never an input.
    assert computed_tokens(model) == sum(len(q.prompt) + len(q.tokens) - 1 for q in queries)
    assert (relay.counters.preemptions, relay.counters.insertions) == (1, 1)
    assert_empty(relay)


def test_resumed_queries_come_before_later_ones(model):
    relay = Relay(model, 1, 32)
    first, second, third = (relay.submit([i], max_new_tokens=4) for i in range(3))
    relay.preempt(second)
    relay.step()
    relay.preempt(first)
    for query in (second, first):
        relay.resume(query)
    assert relay.waiting == (first, second, third)
    relay.run()
    assert_right(model, [first, second, third])


def test_parked_queries_are_no_work(model):
    relay = Relay(model, 1, 32)
    query = relay.submit([1], max_new_tokens=4)
    relay.preempt(query)
    assert relay.step() is False and relay.run() == []
    assert relay.parked == (query,)
    relay.resume(query)
    assert relay.run() == [query]
    assert_right(model, [query])


@LAYOUTS
def test_resize_while_queries_run(model, aligned):
    relay = Relay(model, 2, 32, aligned=aligned)
    queries = [relay.submit(prompt(3 + i, i), max_new_tokens=12) for i in range(6)]
    relay.step()
    relay.resize(4)
    relay.step()
    assert (relay.num_slots, len(relay.running)) == (4, 4)
    relay.cancel(queries[1])
    relay.resize(3)
    assert sorted(q.slot for q in relay.running) == [0, 1, 2]
    relay.resize(1)
    assert (len(relay.running), len(relay.waiting)) == (1, 4)
    assert sum(query.cached > 0 for query in relay.waiting) == 2
    relay.step()
    relay.resize(2)
    relay.run()
    assert_right(model, [query for query in queries if query is not queries[1]])
    assert relay.counters.insertions == 2
    live = [q for q in queries if q is not queries[1]]
    assert computed_tokens(model) == sum(len(q.prompt) + 11 for q in live) + 4 + 1
    assert_empty(relay)
    with pytest.raises(ValueError, match="num_slots must be >= 1, got 0"):
        relay.resize(0)
    with pytest.raises(TypeError):
        relay.resize(1.5)


LEVERS = {
    "cancel_self": lambda relay, queries, me: relay.cancel(me),
    "cancel_next": lambda relay, queries, me: relay.cancel(queries[me.id + 1]),
    "cancel_previous": lambda relay, queries, me: relay.cancel(queries[me.id - 1]),
    "park_self": lambda relay, queries, me: relay.preempt(me),
    "park_next": lambda relay, queries, me: relay.preempt(queries[me.id + 1]),
    "park_all": lambda relay, queries, me: [relay.preempt(query) for query in queries],
    "bounce_all": lambda relay, queries, me: [
        relay.preempt(query) and relay.resume(query) for query in queries
    ],
    "shrink": lambda relay, queries, me: relay.resize(1),
    "grow": lambda relay, queries, me: relay.resize(9),
    "submit": lambda relay, queries, me: queries.append(relay.submit([5], max_new_tokens=3)),
}


@LAYOUTS
@pytest.mark.parametrize("at", [1, 2, 6], ids=["first_token", "second_token", "last_token"])
@pytest.mark.parametrize("lever", LEVERS)
def test_levers_work_from_a_callback(model, lever, at, aligned):
    relay = Relay(model, 3, 32, aligned=aligned)
    queries: list[Query] = []
    heard: dict[int, list[int]] = {}

    def on_token(query, token):
        heard.setdefault(query.id, []).append(token)
        if query is queries[1] and len(query.tokens) == at:
            LEVERS[lever](relay, queries, query)

    for i in range(6):
        queries.append(relay.submit(prompt(2 + i, i), max_new_tokens=6, on_token=on_token))
    relay.run()
    for query in relay.parked:
        relay.resume(query)
    relay.run()
    for query in queries[:6]:
        assert heard.get(query.id, []) == query.tokens
    assert_right(model, [query for query in queries if query.status != "cancelled"])
    assert sum(query.status == "cancelled" for query in queries) <= 1
    assert_empty(relay)


@pytest.mark.parametrize("call", ["step", "run", "close"])
def test_a_callback_cannot_drive_the_relay(model, call):
    relay = Relay(model, 3, 32)
    bad = relay.submit([1], max_new_tokens=4, on_token=lambda *_: getattr(relay, call)())
    good = relay.submit([2], max_new_tokens=4)
    assert relay.run() == [bad, good]
    assert f"{call}: relay must be between two steps" in str(bad.error)
    assert_right(model, [good])
    assert_empty(relay)


@LAYOUTS
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("where", ["callback", "forward"])
def test_ctrl_c_loses_and_repeats_nothing(model, where, at, aligned):
    relay = Relay(model, 3, 32, aligned=aligned)
    heard: dict[int, list[int]] = {}
    pressed = []

    def press_once():
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    def on_token(query, token):
        heard.setdefault(query.id, []).append(token)
        if where == "callback" and query.id == 1 and len(query.tokens) == at:
            press_once()

    def fault(rows):
        if where == "forward" and len(model.forwards) == at:
            press_once()

    model.fault = fault
    queries = [
        relay.submit(prompt(2 + i, i), max_new_tokens=5, on_token=on_token) for i in range(5)
    ]
    with pytest.raises(KeyboardInterrupt):
        relay.run()
    assert relay.run() == queries
    assert_right(model, queries)
    assert all(heard[query.id] == query.tokens for query in queries)
    assert_empty(relay)


class Clock:
    """A clock that only the model advances."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(model) -> Clock:
    clock = Clock()

    def work(rows):
        # A prefill of n tokens takes n seconds and a decode step one.
        clock.now += max(model.forwards[-1])

    model.fault = work
    return clock


def test_counters_of_a_run_worked_out_by_hand(model, clock):
    relay = Relay(model, 2, 32, policies.get("baton", join="never"), clock=clock)
    # Prompts of 4 and 2 together: 0 to 4; steps until 5 and 6, in which A is done; C prefills until
    # 9 while B waits; steps until 10, C is done; 11, B is done.
    a, b, c = (relay.submit(prompt(n), max_new_tokens=m) for n, m in ((4, 3), (2, 5), (3, 2)))
    relay.run()
    assert_right(model, [a, b, c])
    assert [list(q.token_times) for q in (a, b, c)] == [[4, 5, 6], [4, 5, 6, 10, 11], [9, 10]]
    assert (c.submitted, c.first_token, c.finished) == (0, 9, 10)
    counters = relay.counters
    assert (counters.steps, counters.prefills) == (4, 3)
    assert (counters.prompt_tokens, counters.output_tokens) == (9, 10)
    assert (counters.slot_steps, counters.active_slot_steps) == (8, 7)
    assert (counters.prefill_seconds, counters.decode_seconds, counters.seconds) == (7, 4, 11)
    assert counters.slot_idle == 1 - 7 / 8
    assert counters.prefill_stall == 3 / (2 * 11)
    # Prefills read 6 and 3 columns; steps 5 + 3, 6 + 4, 5 + 4, 6.
    assert (counters.columns_read, counters.cache_padding_read) == (42, 0)
    assert counters.joint_padding == 0
    summary = relay.summary()
    assert (summary["policy"], summary["num_slots"], summary["queries"]) == ("baton", 2, 3)
    assert summary["queries_per_second"] == 3 / 11
    assert summary["output_tokens_per_second"] == 10 / 11
    assert summary["ttft_p50"] == pytest.approx(4, rel=0.01)
    assert summary["ttft_p99"] == pytest.approx(9, rel=0.01)
    assert summary["time_per_token_p50"] == 1
    assert summary["time_per_token_p99"] == pytest.approx(4, rel=0.01)


def test_the_timeline_shows_prefill_decode_and_stall(model, clock):
    relay = Relay(model, 2, 32, policies.get("baton", join="never"), clock=clock)
    for length, count in ((4, 3), (2, 5), (3, 2)):
        relay.submit(prompt(length), max_new_tokens=count)
    while relay.counters.steps < 3:
        relay.step()
    open_at_the_end = {(1, 1, 9, 10, "decode")}
    assert {tuple(span) for span in relay.timeline} == {
        (0, 0, 0, 4, "prefill"),
        (1, 1, 0, 4, "prefill"),
        (0, 0, 4, 6, "decode"),
        (1, 1, 4, 6, "decode"),
        (0, 2, 6, 9, "prefill"),
        (0, 2, 9, 10, "decode"),
    } | open_at_the_end
    relay.run()
    assert relay.timeline[-1] == (1, 1, 9, 11, "decode")
    assert relay.timeline[-1].slot == 1
    relay.reset_counters()
    assert relay.timeline == [] and relay.counters.output_tokens == 0
    assert relay.summary()["ttft_p50"] is None and relay.summary()["slot_idle"] == 0


def test_percentiles_are_within_one_percent(model):
    histogram = Relay(model, 1, 8).counters.time_per_token
    seconds = [random.Random(i).lognormvariate(-5, 2) for i in range(999)]
    for value in seconds:
        histogram.add(value)
    seconds.sort()
    for percent in (1, 50, 90, 99):
        exact = seconds[round(len(seconds) * percent / 100 + 0.5) - 1]
        assert histogram.percentile(percent) == pytest.approx(exact, rel=0.0101)
    assert histogram.percentile(100) == pytest.approx(seconds[-1], rel=0.0101)
