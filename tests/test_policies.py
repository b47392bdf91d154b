"""What a policy may say to the relay, and what the two policies say."""

import pytest

from baton_engines import policies
from baton_engines.policies import Forward, Plan, Policy, View
from baton_engines.policies.base import pack_prefills
from baton_engines.query import Query
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


def make_query(id: int, prompt: int, cached: int = 0, tokens: int = 0) -> Query:
    query = Query(id, 0.0)
    query.prompt, query.cached, query.tokens = [1] * prompt, cached, [1] * tokens
    return query


def view(waiting=(), running=(), num_slots=4) -> View:
    return View(waiting, running, num_slots, 100, 0, 8, 0.0)


def test_policies_have_names():
    assert policies.NAMES == ("baton", "run_to_completion")
    for name in policies.NAMES:
        assert policies.get(name).name == name
        assert policies.get(name) is not policies.get(name)
    own = policies.get("baton", max_prefill_tokens=7)
    assert policies.get(own) is own and own.max_prefill_tokens == 7
    text = "name must be one of baton, run_to_completion, got 'bat'"
    with pytest.raises(ValueError, match=text):
        policies.get("bat")
    with pytest.raises(ValueError, match=text):
        Relay(FakeLlama(), 2, 32, "bat")


def test_prefills_are_packed_up_to_a_bound():
    a, b, c, d = (make_query(i, prompt) for i, prompt in enumerate((3, 4, 20, 3)))
    resumed = make_query(4, 5, cached=6, tokens=2)
    partial = make_query(5, 5, cached=3)
    assert pack_prefills((a, b, resumed, c, d, partial), 7) == (
        Forward(((a, 3), (b, 4))),
        Forward(((c, 20),)),
        Forward(((d, 3), (partial, 2))),
    )
    assert pack_prefills((resumed,), 7) == ()


def test_baton_fills_every_free_row():
    waiting = [make_query(i, 3) for i in range(3)]
    running = [make_query(i, 3, cached=4, tokens=2) for i in range(7, 9)]
    decode = Forward(decode=True)
    plan = policies.get("baton").plan(view(waiting, running))
    first, second = waiting[:2]
    assert plan == Plan((), (first, second), (Forward(((first, 3), (second, 3))), decode))
    assert policies.get("baton").plan(view((), running)) == Plan(forwards=(decode,))
    # A query that an interruption left without its first token is prefilled again.
    left = make_query(9, 4, cached=3)
    plan = policies.get("baton").plan(view((), [left]))
    assert plan.forwards == (Forward(((left, 1),)), decode)


def test_run_to_completion_admits_to_an_empty_batch_only():
    waiting = [make_query(i, 3) for i in range(6)]
    running = [make_query(7, 3, cached=4, tokens=2)]
    policy = policies.get("run_to_completion")
    assert policy.plan(view(waiting, running)) == Plan(forwards=(Forward(decode=True),))
    assert policy.plan(view(waiting)).admit == tuple(waiting[:4])


class Joint(Policy):
    """Newcomers' prompts, in chunks, in one forward with the decoders; the last come first, and one
    is parked whenever somebody waits."""

    name = "joint"

    def __init__(self, budget: int, rotate: bool = False):
        self.budget = budget
        self.rotate = rotate

    def plan(self, view: View) -> Plan:
        park = ()
        if self.rotate and view.waiting and not view.num_free:
            park = (next(iter(view.running)),)
        free = view.num_free + len(park)
        newcomers = tuple(sorted(view.waiting, key=lambda query: -query.id)[:free])
        prefill, room = [], self.budget
        for query in (*view.running, *newcomers):
            count = min(query.prompt_left, room)
            if count and query not in park:
                prefill.append((query, count))
                room -= count
        return Plan(park, newcomers, (Forward(tuple(prefill), decode=True),))


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("budget", [1, 5, 1000])
def test_another_policy_gives_the_same_answers(budget, rotate):
    model = FakeLlama()
    relay = Relay(model, 3, 48, Joint(budget, rotate))
    queries = [relay.submit([i] * (1 + 5 * i % 23), max_new_tokens=2 + i) for i in range(9)]
    assert relay.run() == queries
    for query in queries:
        assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens), query.error
    assert relay.cache.shape.used == ()
    assert relay.counters.preemptions == relay.counters.insertions
    assert (relay.counters.preemptions > 0) is rotate
    assert relay.counters.prefill_stall == 0 and relay.counters.joint_tokens > 0


def test_a_joint_forward_of_whole_prompts_works_on_an_aligned_cache():
    model = FakeLlama()
    relay = Relay(model, 3, 48, Joint(1000), aligned=True)
    queries = [relay.submit([i] * (1 + 5 * i % 23), max_new_tokens=2 + i) for i in range(9)]
    relay.run()
    for query in queries:
        assert query.tokens == model.decode_alone(query.prompt, query.max_new_tokens), query.error


class Idle(Policy):
    name = "idle"

    def plan(self, view: View) -> Plan:
        return Plan()


class Greedy(Policy):
    name = "greedy"

    def plan(self, view: View) -> Plan:
        return Plan(admit=tuple(view.waiting), forwards=(Forward(decode=True),))


def test_a_plan_that_cannot_be_carried_out_is_an_error():
    relay = Relay(FakeLlama(), 2, 32, Idle())
    query = relay.submit([1], max_new_tokens=2)
    with pytest.raises(ValueError, match="plan of idle must admit a query when nothing runs"):
        relay.step()
    assert relay.waiting == (query,)
    relay = Relay(FakeLlama(), 2, 32, Greedy())
    queries = tuple(relay.submit([1], max_new_tokens=2) for _ in range(3))
    with pytest.raises(ValueError, match="plan of greedy must admit at most 2 queries, got 3"):
        relay.run()
    assert relay.waiting == queries
    relay.close()
    assert queries[0].status == "cancelled"
