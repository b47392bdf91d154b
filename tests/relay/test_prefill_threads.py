"""The threads that compute prompts: their cores, faults and end, and what they release."""

import gc
import threading
import weakref

import pytest
import torch
from relay_checks import assert_empty, assert_right, prompt

from baton_engines.prefill import Overlapped, Serial, get
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


@pytest.fixture
def model() -> FakeLlama:
    return FakeLlama()


def test_a_job_that_nobody_wants_is_not_computed(model):
    gate, inside = threading.Event(), threading.Event()

    def hold(rows):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            gate.wait()

    model.fault = hold
    with Relay(model, 4, 32, prefill="overlapped") as relay:
        runner = relay.submit(prompt(3), max_new_tokens=9)
        relay.step()
        held = relay.submit(prompt(4), max_new_tokens=2)
        relay.step()
        assert inside.wait(10)
        queued = relay.submit(prompt(5), max_new_tokens=2)
        relay.step()
        relay.cancel(held)
        relay.cancel(queued)
        gate.set()
        relay.run()
        assert_right(model, [runner])
        assert_empty(relay)
    assert (4,) in model.forwards and (5,) not in model.forwards


def test_nothing_that_a_worker_raises_ends_its_thread(model):
    def leave(rows):
        if threading.current_thread() is not threading.main_thread():
            raise SystemExit

    model.fault = leave
    with Relay(model, 3, 32, prefill=Overlapped(always=True)) as relay:
        queries = [relay.submit(prompt(4, i), max_new_tokens=3) for i in range(7)]
        relay.run()
        assert_right(model, queries)
        assert relay.counters.prefill_faults == 7


def test_memory_of_a_prompt_goes_with_it(model):
    caches = []
    new_cache = model.new_cache

    def recorded(*args, **kwargs):
        cache = new_cache(*args, **kwargs)
        caches.append(weakref.ref(cache._memory))
        return cache

    with Relay(model, 4, 64, prefill=Overlapped(always=True)) as relay:
        model.new_cache = recorded
        for i in range(12):
            relay.submit(prompt(9, i), max_new_tokens=3)
        relay.run()
        gc.collect()
        assert caches and all(cache() is None for cache in caches)
        assert_empty(relay)


def test_close_while_prompts_are_away(model):
    gate, inside = threading.Event(), threading.Event()

    def hold(rows):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            gate.wait()

    model.fault = hold
    relay = Relay(model, 4, 32, prefill="overlapped")
    runner = relay.submit(prompt(3), max_new_tokens=9)
    relay.step()
    others = [relay.submit(prompt(4 + i), max_new_tokens=2) for i in range(3)]
    relay.step()
    assert inside.wait(10)
    before = threading.active_count()
    threading.Timer(0.05, gate.set).start()
    relay.close()
    assert {query.status for query in (runner, *others)} == {"cancelled"}
    assert threading.active_count() <= before
    assert not any(thread.name == "baton-prefill" for thread in threading.enumerate())
    assert_empty(relay)
    relay.close()


def test_a_relay_that_is_never_closed_leaves_no_thread(model):
    relay = Relay(model, 2, 32, prefill=Overlapped(workers=2))
    assert sum(thread.name == "baton-prefill" for thread in threading.enumerate()) == 2
    del relay
    gc.collect()
    assert not any(thread.name == "baton-prefill" for thread in threading.enumerate())


def test_cores_are_shared_and_given_back(model):
    inside, gate = threading.Event(), threading.Event()
    seen: dict[str, list[int]] = {"worker": [], "loop": []}

    def note(rows):
        if threading.current_thread() is threading.main_thread():
            seen["loop"].append(torch.get_num_threads())
        else:
            seen["worker"].append(torch.get_num_threads())
            inside.set()
            gate.wait()

    model.fault = note
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with Relay(model, 4, 32, prefill=Overlapped(threads=3)) as relay:
            relay.submit(prompt(3), max_new_tokens=9)
            relay.step()
            newcomer = relay.submit(prompt(4), max_new_tokens=2)
            relay.step()
            assert inside.wait(10)
            relay.step()
            assert torch.get_num_threads() == 4
            gate.set()
            relay.run()
        # A thread that starts later has as many as if there had been no worker.
        later = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert later == [4]
    finally:
        torch.set_num_threads(before)
    assert newcomer.status == "finished"
    assert set(seen["worker"]) == {3}
    assert seen["loop"][:2] == [4, 4] and 1 in seen["loop"] and seen["loop"][-1] == 4


def test_default_threads_are_half_of_torchs(model):
    before = torch.get_num_threads()
    for total, workers, expected in ((1, 1, 1), (2, 1, 1), (6, 1, 3), (8, 2, 2)):
        torch.set_num_threads(total)
        try:
            prefill = Overlapped(workers)
            with Relay(model, 2, 16, prefill=prefill):
                assert prefill.threads == expected
        finally:
            torch.set_num_threads(before)


def test_bad_arguments(model):
    with pytest.raises(
        ValueError, match="mode must be one of serial, overlapped, apart, ray, got 'x'"
    ):
        Relay(model, 2, 16, prefill="x")
    with pytest.raises(ValueError, match="workers must be >= 1, got 0"):
        get("overlapped", workers=0)
    with pytest.raises(ValueError, match="threads must be >= 1, got 0"):
        get("overlapped", threads=0)
    assert isinstance(get("serial"), Serial)
    prefill = Overlapped()
    with Relay(model, 2, 16, prefill=prefill) as relay:
        with pytest.raises(ValueError, match="must belong to one relay"):
            Relay(model, 2, 16, prefill=prefill)
        # The error has not closed it.
        relay.submit([1], max_new_tokens=1)
        assert relay.run()[0].status == "finished"


def test_a_worker_that_cannot_start_leaves_nothing(model):
    def refuse():
        raise OSError("no")

    model.twin = refuse
    with pytest.raises(OSError, match="no"):
        Relay(model, 2, 16, prefill="overlapped")
    assert not any(thread.name == "baton-prefill" for thread in threading.enumerate())
