"""How many prompt tokens `baton` lets join a forward, and what it knows about a forward's cost.

| test | what it checks |
| --- | --- |
| costs_are_found | the fit predicts forwards of another kind than it has seen, within 3 % |
| nothing_is_said_before_eight_forwards | until then the initial sizes are used |
| a_slower_machine | is noticed within 30 forwards; a single late forward is not mistaken for one |
| forwards_grow_slowly | the next one has at most 1.25 times the tokens of the largest so far |
| what_is_not_seen_again | is kept: a thousand decode steps do not forget what prompts cost |
| frugal_tokens | the fewest tokens within the slack, with costs whose optimum is known |
| efficient_tokens | by hand, with a bound on the sizes |
| fitted_sizes | move slowly |
| tokens_that_join | free, frugal, bounded by tokens, by seconds and by what is left: by hand |
| lengths | of the queries that ended |
| ranks | a relay under tensor parallelism shows its policy no clock |
"""

import random
from itertools import pairwise

import pytest
from plan_views import make_decoder, make_query, view

from baton_engines import policies
from baton_engines.policies import Forward, Plan, Work
from baton_engines.policies.baton import FIRST
from baton_engines.policies.costs import FEWEST, FittedCosts
from baton_engines.policies.token_budget import SLACK, efficient_tokens, frugal_tokens
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


def machine(work: Work) -> float:
    """Seconds: almost nothing for additional tokens up to 16, then 700 us each."""
    line = 8e-3 + 3e-4 * min(work.tokens, 16) + 7e-4 * max(0, work.tokens - 16)
    return line + 2e-5 * work.rows + 2e-7 * work.decode_columns + 6e-8 * work.pairs


def decode(rows: int, columns: int = 100) -> Work:
    return Work(rows, rows, rows, rows * columns)


def joint(rows: int, tokens: int, cached: int = 0, columns: int = 100) -> Work:
    pairs = tokens * cached + tokens * (tokens + 1) // 2
    return Work(rows + tokens, rows + 1, rows, rows * columns, cached + tokens, pairs)


def learned(seconds=machine, count: int = 200, slower: float = 1.0) -> FittedCosts:
    numbers, costs = random.Random(0), FittedCosts()
    for _ in range(count):
        rows, columns = numbers.randint(1, 16), numbers.randint(20, 300)
        works = [decode(rows, columns), joint(rows, 2 ** numbers.randint(0, 8), columns=columns)]
        work = numbers.choice(works)
        costs.observe(work, slower * seconds(work))
    return costs


def test_costs_are_found():
    costs = learned()
    for work in (decode(7, 400), joint(12, 100, 50), joint(3, 200, 300), Work(500, 2, pairs=40000)):
        assert costs.seconds(work) == pytest.approx(machine(work), rel=0.03), work
    # Late forwards, caused by the operating system, must not lower the prediction.
    noisy = random.Random(1)
    costs = learned(lambda work: machine(work) * noisy.choice([1, 1, 1, 1, 1.5]))
    assert 0.95 < costs.seconds(decode(8)) / machine(decode(8)) < 1.3
    assert 1.2 < costs.spread < 1.7


def test_nothing_is_said_before_eight_forwards():
    costs = FittedCosts()
    for count in range(FEWEST):
        assert not costs.ready and costs.seconds(decode(4)) == 0, count
        costs.observe(decode(4), 0.01)
    assert costs.ready and costs.seconds(decode(4)) == pytest.approx(0.01, rel=1e-3)


def test_a_slower_machine_is_noticed_within_thirty_forwards():
    costs, works = learned(), [decode(8), joint(8, 64), decode(12), joint(4, 128)]
    costs.observe(works[0], 20 * machine(works[0]))
    assert costs.seconds(works[0]) < 1.15 * machine(works[0])
    for index in range(30):
        costs.observe(works[index % 4], 1.6 * machine(works[index % 4]))
    # Forwards of other sizes, too.
    for work in (*works, joint(16, 200), decode(2)):
        assert costs.seconds(work) == pytest.approx(1.6 * machine(work), rel=0.08), work


def test_what_is_not_seen_again_still_stands():
    costs = learned()
    for index in range(1000):
        costs.observe(decode(8, 100 + index % 50), machine(decode(8, 100 + index % 50)))
    for work in (joint(8, 64), joint(8, 250)):
        assert costs.seconds(work) == pytest.approx(machine(work), rel=0.05), work


def test_frugal_tokens():
    # Reading the weights costs as much as 100 tokens: time per query falls with every additional
    # token. The fewest within the slack are many more than where a forward costs nothing by itself.
    few = frugal_tokens(lambda tokens: 1e-6 + tokens, 16, 200, 50)
    many = frugal_tokens(lambda tokens: 100.0 + tokens, 16, 200, 50)
    assert few < 32 < many < 1000
    # Free up to 300 tokens, then steep: takes the free ones, however long the prompts are.
    for prompt in (100, 1000, 4000):
        tokens = frugal_tokens(lambda n: 1.0 + max(0, n - 300) / 30, 64, prompt, 20)
        assert 200 < tokens <= 330, prompt
    # All the work of a query fits in one forward with the others: more tokens would change nothing.
    assert frugal_tokens(lambda tokens: 100.0 + tokens, 4, 10, 100) <= 40
    assert 0 < SLACK < 0.05


def test_efficient_tokens():
    # A forward costs as much as 100 tokens: 4 % more than the least per token.
    assert 1850 <= efficient_tokens(lambda tokens: 100.0 + tokens) < 1850 * 9 / 8
    assert 250 <= efficient_tokens(lambda tokens: 100.0 + tokens, 320) < 250 * 9 / 8
    # Free up to 300 tokens.
    assert 280 < efficient_tokens(lambda tokens: max(tokens, 300.0)) < 330
    assert efficient_tokens(lambda tokens: float(tokens)) == 4
    assert efficient_tokens(lambda tokens: 1.0, 1) == 4


def test_fitted_sizes_move_slowly():
    """The search ends in a flat curve, so that noise moves its result far."""
    policy = policies.get("baton")
    for i in range(64):
        policy.note_end(make_query(i, 300, tokens=20))
    sizes = [FIRST]
    for _ in range(3 * FEWEST):
        # Without a base: the fewest tokens are the best.
        for count in (7, 255):
            policy.observe(joint(1, count), 1e-3 * (1 + count))
        sizes.append(policy._wanted_tokens(view(num_slots=8)) if policy._fitted.ready else FIRST)
    changes = [after / before for before, after in pairwise(sizes)]
    assert min(changes) > 0.3
    assert max(changes) < 1.05
    assert sizes[-1] < 40


def test_tokens_that_join():
    # A token costs a second, a forward four more.
    policy = policies.get("baton", costs=lambda work: 4.0 + work.tokens)
    for i in range(64):
        policy.note_end(make_query(i, 300, tokens=20))
    decoders = [make_decoder(i) for i in (7, 8)]
    first, second, third = (make_query(i, length) for i, length in enumerate((30, 900, 9)))
    frugal = policy._wanted_tokens(view(num_slots=8))
    # Lengths are rounded to quarter powers of two.
    lengths = 2 ** (33 / 4), 2 ** (17 / 4)
    assert frugal == frugal_tokens(lambda tokens: 4.0 + tokens, 8, *lengths) > 35
    plan = policy.plan(view([first, second, third], decoders, num_slots=8))
    joined = Forward(((first, 30), (second, frugal - 2 - 30)), decode=True)
    assert plan == Plan((), (first, second), (joined,))
    # Started prompts come before waiting ones.
    under_way = make_query(9, 5, cached=2)
    plan = policy.plan(view([first], [*decoders, under_way], num_slots=8))
    assert plan.forwards[0].prefill == ((under_way, 3), (first, min(30, frugal - 2 - 3)))
    # A parked query that comes back decodes at once, regardless of the queries before it.
    back = make_decoder(3)
    plan = policy.plan(view([second, back], decoders, num_slots=8))
    assert plan == Plan((), (second, back), (Forward(((second, frugal - 3),), decode=True),))


@pytest.mark.parametrize(
    "options, tokens",
    [
        # Two decoders take 4 + 2 seconds: 9 s allow 3 tokens more, 9.5 s too, 6 s at least one.
        ({"max_token_gap": 9.0}, 3),
        ({"max_token_gap": 9.5}, 3),
        ({"max_token_gap": 6.0}, 1),
        ({"max_stall_tokens": 5}, 5),
        ({"max_stall_tokens": 5, "max_token_gap": 8.0}, 2),
        ({"max_prefill_tokens": 6}, 6),
    ],
)
def test_bounds_on_the_tokens_that_join(options, tokens):
    policy = policies.get("baton", costs=lambda work: 4.0 + work.tokens, **options)
    long, decoders = make_query(0, 900), [make_decoder(i) for i in (7, 8)]
    plan = policy.plan(view([long], decoders))
    assert plan.forwards == (Forward(((long, tokens),), decode=True),)
    # While no query decodes, none has to wait; memory is bounded all the same.
    ((_, alone),) = policy.plan(view([long])).forwards[0].prefill
    assert alone == 6 if "max_prefill_tokens" in options else alone > 20


def test_free_tokens_join_whatever_pays():
    # The next hundred tokens take a tenth of a step: answers this long would need fewer.
    policy = policies.get("baton", costs=lambda work: 1.0 + work.tokens / 1000)
    query, decoders = make_query(0, 90, count=90), [make_decoder(i) for i in (7, 8)]
    plan = policy.plan(view([query], decoders))
    assert plan.forwards == (Forward(((query, 90),), decode=True),)


def test_sizes_while_nothing_is_known():
    long, decoder = make_query(0, 900), make_decoder(7)
    assert policies.get("baton").plan(view([long], [decoder])).forwards[0].prefill == ((long, 255),)
    bounded = policies.get("baton", max_token_gap=1.0)
    assert bounded.plan(view([long], [decoder])).forwards[0].prefill == ((long, 8),)
    assert bounded.plan(view([long])).forwards[0].prefill == ((long, 256),)


def test_forwards_grow_slowly():
    """Even if the costs so far say that more tokens are free."""
    long, decoder = make_query(0, 900), make_decoder(7)
    policy, largest = policies.get("baton"), 41
    for _ in range(FEWEST):
        policy.observe(joint(1, largest - 1), 0.01)
        policy.observe(decode(1), 0.01)
    for _ in range(4):
        ((_, count),) = policy.plan(view([long], [decoder])).forwards[0].prefill
        assert largest < count + 1 <= 1.25 * largest
        largest = count + 1
        for _ in range(FEWEST):
            policy.observe(joint(1, count), 0.01)


def test_the_next_queries_are_taken_to_be_as_long_as_those_that_ended():
    policy = policies.get("baton", costs=lambda work: 4.0 + work.tokens)
    waiting = [make_query(0, 40, count=100)]
    assert policy._lengths(view(waiting)) == (40, 100)
    for i in range(8):
        policy.note_end(make_query(i, 10, tokens=3, count=100))
    # A query that ended before its first token says nothing about lengths.
    policy.note_end(make_query(9, 1000, tokens=0))
    assert policy._lengths(view(waiting)) == (10, 3)


def test_a_relay_tells_its_policy_what_a_forward_took():
    seen, ended = [], []

    class Watcher(policies.Baton):
        def observe(self, work, seconds):
            seen.append((work, seconds))

        def note_end(self, query):
            ended.append(query.id)

    model, now = FakeLlama(), [0.0]

    def work(rows):
        now[0] += len(rows)

    model.fault = work
    relay = Relay(model, 2, 32, Watcher(), clock=lambda: now[0])
    relay.submit([1] * 4, max_new_tokens=3)
    relay.submit([2] * 6, max_new_tokens=1)
    relay.run()
    assert seen == [
        (Work(tokens=10, rows=2, prefill_columns=10, pairs=10 + 21), 2),
        (Work(1, 1, 1, 5), 1),
        (Work(1, 1, 1, 6), 1),
    ]
    assert ended == [1, 0]


def test_plans_of_ranks_do_not_depend_on_their_clocks():
    """Under tensor parallelism every rank runs its own relay. If a policy saw the rank's clock, the
    ranks would compute different chunks."""

    class Sharded(FakeLlama):
        num_ranks = 2

    def forwards(seed: int) -> list:
        model, clock = Sharded(), random.Random(seed)
        policy = policies.get("baton")
        now = [0.0]

        def tick() -> float:
            now[0] += clock.random()
            return now[0]

        relay = Relay(model, 4, 400, policy, clock=tick)
        for i in range(30):
            relay.submit([i] * (1 + 37 * i % 300), max_new_tokens=1 + i % 9)
        relay.run()
        assert not policy._fitted.ready
        return model.forwards

    assert forwards(0) == forwards(1)
    with pytest.raises(ValueError, match="must not depend on the clock under tensor parallelism"):
        Relay(Sharded(), 4, 400, policies.get("baton", max_token_gap=0.1))
    costs = {"costs": lambda work: 1.0 + work.tokens}
    Relay(Sharded(), 4, 400, policies.get("baton", max_token_gap=0.1, **costs)).close()
