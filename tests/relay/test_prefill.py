"""Prompts that are computed outside the decode loop: same answers, no query waits, and faults
affect only their query."""

import pytest
from relay_checks import assert_empty, assert_right, prompt

from baton_engines import policies
from baton_engines.prefill import Overlapped
from baton_engines.relay import Query, Relay
from baton_engines.testing import FakeLlama
from baton_engines.testing.prefill import ManualPrefiller

LAYOUTS = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])


@pytest.fixture
def model() -> FakeLlama:
    return FakeLlama()


@pytest.fixture
def manual() -> ManualPrefiller:
    return ManualPrefiller()


def begin(relay: Relay, away: int = 1) -> tuple[Query, list[Query]]:
    """A query that decodes, and others whose prompts are in flight."""
    runner = relay.submit(prompt(3), max_new_tokens=20)
    relay.step()
    others = [relay.submit(prompt(6 + i, i), max_new_tokens=4) for i in range(away)]
    relay.step()
    assert all(query in relay._loop.in_flight for query in others)
    return runner, others


@LAYOUTS
@pytest.mark.parametrize("always", [False, True], ids=["beside", "always"])
@pytest.mark.parametrize("policy", ["baton", "run_to_completion"])
def test_every_query_gets_the_answer_that_it_gets_alone(model, policy, always, aligned):
    for prefill in (Overlapped(always=always), Overlapped(workers=3, always=always)):
        with Relay(model, 3, 48, policy, aligned=aligned, prefill=prefill) as relay:
            queries = [
                relay.submit(prompt(1 + i * 7 % 30), max_new_tokens=1 + i * 5 % 17)
                for i in range(14)
            ]
            late = []

            def arrive(relay, late=late):
                if len(late) < 6:
                    late.append(relay.submit(prompt(3 + len(late), 1), max_new_tokens=4))

            assert relay.run(progress=arrive) == queries + late
            assert_right(model, queries + late)
            assert_empty(relay)
            assert relay.counters.prompt_tokens == sum(len(q.prompt) for q in queries + late)
            if always:
                assert relay.counters.prefills_elsewhere == 20
            elif policy == "baton":
                # Only the first three arrive while no query decodes.
                assert relay.counters.prefills_elsewhere >= 1
            assert relay.summary()["prefill"] == "overlapped"


@LAYOUTS
def test_the_batch_decodes_while_a_prompt_is_away(model, manual, aligned):
    with Relay(model, 3, 32, aligned=aligned, prefill=manual) as relay:
        runner, (newcomer,) = begin(relay)
        for tokens in range(2, 7):
            assert len(runner.tokens) == tokens + 1 and newcomer.tokens == []
            relay.step()
        assert (newcomer.status, newcomer.cached) == ("running", 0)
        assert relay.cache.bytes_in_use == relay.cache.bytes_per_token * (3 + 7)
        manual.compute()
        relay.step()
        # Its first token when it enters, its second in the step that follows.
        assert len(newcomer.tokens) == 2
        relay.run()
        assert_right(model, [runner, newcomer])
        assert_empty(relay)
        assert relay.counters.prefill_stall == 0


def test_counters_of_a_prompt_that_is_away(model, manual):
    now = [0.0]

    def work(rows):
        now[0] += 1

    model.fault = work
    with Relay(model, 4, 32, prefill=manual, clock=lambda: now[0]) as relay:
        a = relay.submit(prompt(3), max_new_tokens=6)
        relay.step()  # prefill until 1, step until 2
        b, c = (relay.submit(prompt(4, i), max_new_tokens=2) for i in range(2))
        relay.step()  # b and c leave in one job; a until 3
        d = relay.submit(prompt(5), max_new_tokens=1)
        relay.step()  # d waits for the worker; a until 4
        manual.compute()  # until 5
        relay.step()  # b and c enter and decode with a until 6; d's turn
        relay.run()
        counters = relay.counters
        assert_right(model, [a, b, c, d])
        assert counters.prefills_elsewhere == counters.prefills - 1 == 3
        assert counters.prefill_seconds == 1 and counters.stalled_slot_seconds == 0
        assert counters.prefill_stall == 0
        # a; a, b and c in flight; the same and d idle; a, b, c and d in flight; then a and d in
        # flight.
        assert counters.slot_steps == 4 * counters.steps == 4 * 5
        assert counters.active_slot_steps == 1 + 3 + 3 + 4 + 2
        assert counters.prefilling_slot_steps == 0 + 2 + 2 + 1 + 1
        assert counters.slot_prefilling == 6 / 20
        assert counters.columns_read == 3 + 4 + 5 + 6 + (4 + 4 + 7 + 5 + 5) + 8 + 5
        spans = {tuple(span) for span in relay.timeline}
        # From the first step with the job at a worker until the insertion.
        assert (1, b.id, 3, 5, "prefill") in spans
        assert (2, c.id, 3, 5, "prefill") in spans


@LAYOUTS
@pytest.mark.parametrize("when", ["queued", "started", "computed"])
def test_cancel_while_the_prompt_is_away(model, manual, when, aligned):
    with Relay(model, 4, 32, aligned=aligned, prefill=manual) as relay:
        runner, (first, second) = begin(relay, away=2)
        third = relay.submit(prompt(9), max_new_tokens=5)
        relay.step()
        victim = third if when == "queued" else first
        if when == "computed":
            manual.compute()
        assert relay.cancel(victim) is True
        assert victim.status == "cancelled" and victim.tokens == []
        relay.run()
        assert_right(model, [q for q in (runner, first, second, third) if q is not victim])
        assert_empty(relay)


@LAYOUTS
def test_preempt_and_resize_while_the_prompt_is_away(model, manual, aligned):
    with Relay(model, 4, 32, aligned=aligned, prefill=manual) as relay:
        runner, (first, second, third) = begin(relay, away=3)
        assert relay.preempt(first) is True
        assert (first.status, first.slot, first.cached) == ("parked", None, 0)
        assert relay.counters.preemptions == 0
        relay.resize(2)
        assert third.status == "waiting" and second.status == "running"
        relay.resize(7)
        relay.step()
        relay.resume(first)
        relay.step()
        # One query still needs the first job; the two others were handed over anew.
        assert len(manual.jobs) == 3
        relay.run()
        assert_right(model, [runner, first, second, third])
        assert_empty(relay)


@LAYOUTS
def test_a_row_moves_while_its_prompt_is_away(model, manual, aligned):
    with Relay(model, 4, 32, aligned=aligned, prefill=manual) as relay:
        runner, (first, second) = begin(relay, away=2)
        relay.cancel(first)
        assert second.slot == 2
        relay.resize(2)
        assert second.slot == 1 and second in relay._loop.in_flight
        relay.run()
        assert_right(model, [runner, second])
        assert_empty(relay)


@LAYOUTS
def test_a_prompt_that_fails_elsewhere_is_computed_in_the_loop(model, manual, aligned):
    def raise_once():
        manual.fault = lambda: None
        raise ArithmeticError("not today")

    manual.fault = raise_once
    with Relay(model, 4, 32, aligned=aligned, prefill=manual) as relay:
        runner, others = begin(relay, away=2)
        relay.run()
        assert_right(model, [runner, *others])
        assert relay.counters.prefill_faults == 2 and relay.counters.prefills_elsewhere == 0
        later = relay.submit(prompt(4), max_new_tokens=2)
        runner = relay.submit(prompt(5), max_new_tokens=20)
        relay.step()
        other = relay.submit(prompt(6), max_new_tokens=2)
        relay.run()
        assert_right(model, [later, runner, other])
        assert relay.counters.prefills_elsewhere == 1
        assert_empty(relay)


def test_a_prompt_that_cannot_be_computed_anywhere_fails_alone(model):
    def poison(rows):
        if any(tokens[0] == 48 for tokens in rows):
            raise ArithmeticError("poison")

    model.fault = poison
    model.bad_row = lambda tokens: tokens[0] == 49
    with Relay(model, 4, 32, prefill="overlapped") as relay:
        runner = relay.submit(prompt(3), max_new_tokens=20)
        relay.step()
        bad = relay.submit([48, 1, 2], max_new_tokens=3)
        nan = relay.submit([49, 1, 2, 3], max_new_tokens=3)
        good = relay.submit(prompt(4), max_new_tokens=3)
        relay.run()
        assert_right(model, [runner, good])
        assert bad.status == nan.status == "failed"
        assert "forward of query 1 must not raise, got ArithmeticError" in str(bad.error)
        assert isinstance(nan.error, FloatingPointError)
        assert_empty(relay)


@LAYOUTS
@pytest.mark.parametrize("where", ["wait", "insertion", "callback", "hand_over"])
def test_ctrl_c_loses_and_repeats_nothing(model, manual, monkeypatch, where, aligned):
    pressed = []

    def press_once(*_):
        if not pressed:
            pressed.append(True)
            raise KeyboardInterrupt

    heard: dict[int, list[int]] = {}

    def on_token(query, token):
        heard.setdefault(query.id, []).append(token)
        if where == "callback" and query.id == 2:
            press_once()

    with Relay(model, 4, 32, aligned=aligned, prefill=manual) as relay:
        runner = relay.submit(prompt(3), max_new_tokens=5, on_token=on_token)
        relay.step()
        owner, name = {
            "wait": (manual, "wait"),
            "insertion": (relay._batch.slots, "fill"),
            "callback": (manual, "name"),
            "hand_over": (manual, "submit"),
        }[where]
        if where != "callback":
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args: (press_once(), original(*args))[1])
        others = [
            relay.submit(prompt(4 + i, i), max_new_tokens=4, on_token=on_token) for i in range(3)
        ]
        with pytest.raises(KeyboardInterrupt):
            relay.run()
        relay.run()
        assert pressed
        assert_right(model, [runner, *others])
        assert all(heard[query.id] == query.tokens for query in (runner, *others))
        assert_empty(relay)


def test_an_interrupted_insertion_is_made_again(model, manual):
    """A Ctrl-C in the middle of the write, after the row was freed."""
    with Relay(model, 4, 32, prefill=manual) as relay:
        runner, (newcomer,) = begin(relay)
        allocate, calls = relay.cache.allocate, []

        def interrupted(*args):
            if not calls:
                calls.append(args)
                raise KeyboardInterrupt
            return allocate(*args)

        relay.cache.allocate = interrupted
        with pytest.raises(KeyboardInterrupt):
            relay.run()
        relay.run()
        assert_right(model, [runner, newcomer])
        assert relay.counters.prefills_elsewhere == 1
        assert_empty(relay)


def test_a_bound_on_the_stall_keeps_no_prompt_that_stalls_nobody(model, manual):
    policy = policies.get("baton", max_stall_tokens=2)
    with Relay(model, 4, 32, policy, prefill=manual) as relay:
        runner, others = begin(relay, away=2)
        assert [len(job.prompts) for job in manual.jobs] == [2]
        relay.run()
        assert_right(model, [runner, *others])


@LAYOUTS
def test_what_lands_keeps_to_the_budget(model, manual, aligned):
    """The decoding query uses the room that was free when the prompt was handed over; the newcomer
    is parked until the other has ended, and then prefilled again."""
    budget = 43 * 256
    with Relay(model, 4, 48, aligned=aligned, prefill=manual, kv_budget=budget) as relay:
        runner = relay.submit(prompt(3), max_new_tokens=40)
        relay.step()
        newcomer = relay.submit(prompt(6), max_new_tokens=15)
        relay.step()
        assert newcomer in relay._loop.in_flight
        while len(runner.tokens) < 37:
            relay.step()
        manual.compute()
        relay.step()
        assert newcomer.status == "waiting" and newcomer.slot is None
        relay.run()
        assert_right(model, [runner, newcomer])
        assert relay.counters.peak_kv_bytes <= budget
        assert_empty(relay)


def test_policies_that_share_forwards_compute_prompts_in_them(model, manual):
    for policy in ("orca", "padded_orca", "chunked"):
        with Relay(model, 3, 32, policy, prefill=manual) as relay:
            queries = [relay.submit(prompt(4 + i), max_new_tokens=5) for i in range(6)]
            relay.run()
            assert_right(model, queries)
            assert relay.counters.prefills_elsewhere == 0 and manual.jobs == []
