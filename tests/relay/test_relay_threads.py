"""A relay that is called from a second thread raises an error and continues."""

import threading

import pytest

from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama

CALLS = {
    "submit": lambda relay, query: relay.submit([1], max_new_tokens=1),
    "submit_n": lambda relay, query: relay.submit_n([1], 2, max_new_tokens=1),
    "step": lambda relay, query: relay.step(),
    "run": lambda relay, query: relay.run(),
    "cancel": Relay.cancel,
    "preempt": Relay.preempt,
    "resume": Relay.resume,
    "resize": lambda relay, query: relay.resize(3),
    "close": lambda relay, query: relay.close(),
}


def in_another_thread(call) -> list[BaseException]:
    errors: list[BaseException] = []

    def run():
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="second")
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("name", CALLS)
def test_a_second_thread_in_the_middle_of_a_step_is_refused(name):
    heard = []

    def meddle(query, token):
        if not heard:
            heard.extend(in_another_thread(lambda: CALLS[name](relay, query)))

    relay = Relay(FakeLlama(), 2, 32)
    query = relay.submit([1, 2, 3], max_new_tokens=6, on_token=meddle)
    other = relay.submit([3, 1], max_new_tokens=6)
    relay.run()
    (error,) = heard
    assert isinstance(error, RuntimeError)
    assert str(error).startswith(f"Relay.{name}: calls must come from one thread, got one from")
    assert query.status == other.status == "finished"
    alone = Relay(FakeLlama(), 1, 32)
    expected = alone.submit([1, 2, 3], max_new_tokens=6)
    alone.run()
    assert query.tokens == expected.tokens
    assert relay.num_slots == 2


def test_a_thread_may_take_over_between_two_calls():
    relay = Relay(FakeLlama(), 2, 32)
    query = relay.submit([1, 2, 3], max_new_tokens=6)
    relay.step()
    assert in_another_thread(relay.run) == []
    assert query.status == "finished"
    relay.close()
