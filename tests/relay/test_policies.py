"""Plans that the relay accepts, and the plans of each policy."""

import pytest
from plan_views import make_decoder, make_query, view

from baton_engines import policies
from baton_engines.policies import Forward, Plan, Policy, View
from baton_engines.policies.base import pack_prefills
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama

DECODE = Forward(decode=True)


def test_policies_have_names():
    assert policies.NAMES == (
        "baton",
        "chunked",
        "multi_bin",
        "orca",
        "padded_orca",
        "run_to_completion",
    )
    for name in policies.NAMES:
        assert policies.get(name).name == name
        assert policies.get(name) is not policies.get(name)
    own = policies.get("baton", max_prefill_tokens=7)
    assert policies.get(own) is own and own.max_prefill_tokens == 7
    text = "name must be one of baton, chunked, .*, run_to_completion, got 'bat'"
    with pytest.raises(ValueError, match=text):
        policies.get("bat")
    with pytest.raises(ValueError, match="options of orca must be admission, got 'bins'"):
        policies.get("orca", bins=3)
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


def test_baton_apart_fills_every_free_row():
    policy = policies.get("baton", join="never")
    waiting = [make_query(i, 3) for i in range(3)]
    running = [make_query(i, 3, cached=4, tokens=2) for i in range(7, 9)]
    plan = policy.plan(view(waiting, running))
    first, second = waiting[:2]
    assert plan == Plan((), (first, second), (Forward(((first, 3), (second, 3))), DECODE))
    assert policy.plan(view((), running)) == Plan(forwards=(DECODE,))
    # Prompts that are computed elsewhere never join.
    assert policies.get("baton").plan(view(waiting, running, prefills_elsewhere=True)) == plan
    # A query that an interruption left without its first token is prefilled again.
    left = make_query(9, 4, cached=3)
    plan = policy.plan(view((), [left]))
    assert plan.forwards == (Forward(((left, 1),)), DECODE)


def test_run_to_completion_admits_to_an_empty_batch_only():
    waiting = [make_query(i, 3) for i in range(6)]
    running = [make_query(7, 3, cached=4, tokens=2)]
    policy = policies.get("run_to_completion")
    assert policy.plan(view(waiting, running)) == Plan(forwards=(DECODE,))
    assert policy.plan(view(waiting)).admit == tuple(waiting[:4])


def test_baton_apart_bounds_the_tokens_between_two_steps():
    policy = policies.get("baton", max_stall_tokens=10, join="never")
    a, b, c = (make_query(i, prompt) for i, prompt in enumerate((7, 8, 2)))
    decoder = make_decoder(9)
    # While no query decodes, none has to wait for a prefill.
    assert policy.plan(view([a, b, c])).forwards == (Forward(((a, 7), (b, 8), (c, 2))), DECODE)
    # With a decoder: A whole, a chunk of B, and C only once there is room for it.
    plan = policy.plan(view([a, b, c], [decoder]))
    assert plan == Plan((), (a, b), (Forward(((a, 7), (b, 3))), DECODE))
    # The next iteration finishes B, whose five remaining tokens come before C.
    b.cached = 3
    assert policy.plan(view([c], [decoder, b])).forwards == (Forward(((b, 5), (c, 2))), DECODE)
    # A query that comes back with all its keys needs no room.
    parked = make_decoder(4)
    policy = policies.get("baton", max_stall_tokens=7, join="never")
    assert policy.plan(view([a, parked, c], [decoder])).admit == (a, parked)


@pytest.mark.parametrize("join", ["auto", "never"])
def test_baton_takes_whole_prompts_where_they_have_to_be(join):
    policy = policies.get("baton", max_stall_tokens=10, join=join)
    a, b, c = (make_query(i, prompt) for i, prompt in enumerate((30, 8, 2)))
    decoder = make_decoder(9)

    def forwards(*chunks):
        return (Forward(chunks, decode=True),) if join == "auto" else (Forward(chunks), DECODE)

    plan = policy.plan(view([a, b, c], [decoder], whole_prompts=True))
    assert plan == Plan((), (a,), forwards((a, 30)))
    plan = policy.plan(view([b, c, a], [decoder], whole_prompts=True))
    assert plan == Plan((), (b, c), forwards((b, 8), (c, 2)))


def test_orca_packs_newcomers_and_decoders():
    waiting = [make_query(i, prompt) for i, prompt in enumerate((3, 70, 5))]
    parked = make_decoder(3)
    running = [make_decoder(8), make_query(9, 6)]
    plan = policies.get("orca").plan(view(waiting, running))
    first, second = waiting[:2]
    joint = Forward(((running[1], 6), (first, 3), (second, 70)), decode=True)
    assert plan == Plan((), (first, second), (joint,))
    # Nothing to pad, nothing to prefill.
    assert policies.get("padded_orca").plan(view([parked], running[:1])) == Plan(
        (), (parked,), (DECODE,)
    )


def test_padded_orca_pads_the_forwards_of_orca():
    waiting, running = [make_query(i, 3 + i) for i in range(3)], [make_decoder(8)]
    packed = policies.get("orca").plan(view(waiting, running))
    padded = policies.get("padded_orca").plan(view(waiting, running))
    assert padded == packed._replace(forwards=(packed.forwards[0]._replace(padded=True),))


def test_chunked_fills_a_budget_of_tokens():
    policy = policies.get("chunked", token_budget=10)
    decoders = [make_decoder(i) for i in (6, 7)]
    under_way = make_query(8, 9, cached=4)
    a, b, c = (make_query(i, prompt) for i, prompt in enumerate((2, 30, 1)))
    # Two decoders, five tokens of the started prompt, two of A, one of B.
    plan = policy.plan(view([a, b, c], [*decoders, under_way], num_slots=8))
    joint = Forward(((under_way, 5), (a, 2), (b, 1)), decode=True)
    assert plan == Plan((), (a, b), (joint,))
    # A query that comes back decodes one token of the budget.
    parked = make_decoder(5)
    policy = policies.get("chunked", token_budget=4)
    plan = policy.plan(view([parked, b], decoders, num_slots=8))
    assert plan == Plan((), (parked, b), (Forward(((b, 1),), decode=True),))
    # More decoders than the budget has tokens: prompts still advance.
    policy = policies.get("chunked", token_budget=2)
    plan = policy.plan(view([a], [*decoders, under_way], num_slots=8))
    assert plan == Plan((), (), (Forward(((under_way, 1),), decode=True),))


def test_policies_reserve_what_their_papers_say():
    # A running query with at most 3 + 20 - 1 tokens, newcomers with 4 + 19 and 2 + 20 - 1.
    decoder = make_decoder(9)
    first, second = make_query(0, 4, count=20), make_query(1, 2, count=20)
    for name, budget, admitted in (
        ("orca", 22 + 23 + 21, 2),
        ("orca", 22 + 23 + 20, 1),
        ("padded_orca", 22 + 22, 0),
        # Prompts, or the tokens so far, and room to grow by 16 tokens.
        ("baton", 20 + 20 + 18, 2),
        ("baton", 20 + 20 + 17, 1),
        ("chunked", 20 + 19, 0),
    ):
        plan = policies.get(name).plan(view([first, second], [decoder], budget=budget))
        assert len(plan.admit) == admitted, (name, budget)
    for name in ("run_to_completion", "multi_bin"):
        policy = policies.get(name)
        assert policy.plan(view([first, second], budget=23 + 21)).admit == (first, second)
        assert policy.plan(view([first, second], budget=23 + 20)).admit == (first,)
    # No query counts with more than it may ever have.
    brief = make_query(3, 4, count=2)
    assert policies.get("baton").plan(view([brief], [decoder], budget=20 + 5)).admit == (brief,)


BAD_OPTIONS = {
    "Baton: max_stall_tokens must be >= 1, got 0": ("baton", {"max_stall_tokens": 0}),
    "Baton: max_prefill_tokens must be >= 1, got 0": ("baton", {"max_prefill_tokens": 0}),
    "Baton: max_token_gap must be above 0, got 0": ("baton", {"max_token_gap": 0}),
    "Baton: max_token_gap must be None for join 'never', got 0.1": (
        "baton",
        {"max_token_gap": 0.1, "join": "never"},
    ),
    "Baton: join must be one of auto, never, got 'always'": ("baton", {"join": "always"}),
    "Chunked: token_budget must be >= 1, got 0": ("chunked", {"token_budget": 0}),
    "MultiBin: bins must be >= 1, got 0": ("multi_bin", {"bins": 0}),
    "MultiBin: batch_size must be >= 1, got -1": ("multi_bin", {"batch_size": -1}),
    "MultiBin: length must be max_new_tokens, prompt or callable, got 'x'": (
        "multi_bin",
        {"length": "x"},
    ),
    "MultiBin: edges must be 1 lengths in ascending": ("multi_bin", {"bins": 2, "edges": [1, 2]}),
    "policies.get_admission: name must be one of fcfs, .*, got 'last'": (
        "orca",
        {"admission": "last"},
    ),
}


@pytest.mark.parametrize("message", BAD_OPTIONS)
def test_options_that_make_no_sense(message):
    name, options = BAD_OPTIONS[message]
    with pytest.raises(ValueError, match=message):
        policies.get(name, **options)


def test_a_policy_that_splits_prompts_is_refused_where_they_have_to_be_whole():
    with pytest.raises(ValueError, match="policy must compute prompts whole .* got chunked"):
        Relay(FakeLlama(), 2, 32, "chunked", aligned=True)
    model = FakeLlama()
    model.whole_prompts = True
    with pytest.raises(ValueError, match="under dynamic RoPE, got chunked"):
        Relay(model, 2, 32, "chunked")
    relay = Relay(model, 2, 32, policies.get("baton", max_stall_tokens=2))
    for prompt in (1, 9, 8):
        relay.submit([1] * prompt, max_new_tokens=3 + prompt)
    relay.run()
    # The third prompt joins the decoder, whole although the stall is bounded by 2.
    assert model.forwards[0] == (1, 9) and (8, 1) in model.forwards


class Joint(Policy):
    """Newcomers' prompts join the decoders' forward in chunks; the last come first, and one query
    is parked whenever another waits."""

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
