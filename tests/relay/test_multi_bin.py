"""Multi-bin batching: which batches form, and that they gain what the paper says."""

import random
from collections import deque

import pytest

from baton_engines import policies
from baton_engines.policies import View
from baton_engines.query import Query


def make_query(id: int, count: int, prompt: int = 1) -> Query:
    query = Query(id, 0.0)
    query.prompt, query.max_new_tokens = [1] * prompt, count
    return query


def view(waiting, running=(), num_slots=2, more_to_come=False) -> View:
    return View(waiting, running, num_slots, 1000, 0, 8, 0.0, more_to_come=more_to_come)


def admitted(policy, waiting, **changes) -> list[int]:
    return [query.id for query in policy.plan(view(waiting, **changes)).admit]


def queries_of(*counts: int) -> list[Query]:
    return [make_query(id, count) for id, count in enumerate(counts)]


def test_the_batch_that_was_full_first_goes_first():
    policy = policies.get("multi_bin", bins=2, edges=[10])
    # Bin 0 is full with query 3, bin 1 with query 2.
    waiting = queries_of(3, 50, 60, 4, 5, 70)
    assert admitted(policy, waiting) == [1, 2]
    assert admitted(policy, [waiting[i] for i in (0, 3, 4, 5)]) == [0, 3]
    # A length equal to an edge belongs to the bin above it.
    assert admitted(policy, queries_of(3, 10, 9, 11)) == [0, 2]


def test_a_batch_that_is_not_full_waits_for_more():
    policy = policies.get("multi_bin", bins=2, edges=[10])
    waiting = queries_of(50, 3)
    assert admitted(policy, waiting, more_to_come=True) == []
    # Input has ended: the query that waits longest runs, with the others in its bin only.
    assert admitted(policy, waiting) == [0]
    waiting = queries_of(3, 50, 60)
    assert admitted(policy, waiting, more_to_come=True) == [1, 2]
    # No query joins a running batch.
    decoder = make_query(9, 5)
    decoder.cached, decoder.tokens = 1, [1]
    assert admitted(policy, waiting, running=[decoder]) == []


def test_a_batch_that_nobody_fills_goes_in_its_turn():
    """A single query in its bin, and an endless stream of others."""
    policy = policies.get("multi_bin", bins=2, edges=[10])
    waiting = [make_query(id, 50 if id == 5 else 3) for id in range(12)]
    submitted, batch = 12, ()
    while waiting and 5 in [query.id for query in waiting]:
        batch = policy.plan(view(waiting, more_to_come=True)).admit
        waiting = [query for query in waiting if query not in batch]
        waiting += [make_query(submitted + i, 3) for i in range(2)]
        submitted += 2
    # It counts as full with query 5 + 4 x 2 bins x 2: after the pair 19, 20, before 21, 22.
    assert [query.id for query in batch] == [5]
    assert waiting[0].id == 21


def test_bins_hold_equal_shares_of_the_lengths_seen():
    policy = policies.get("multi_bin", bins=4)
    lengths = list(range(1, 101))
    random.Random(0).shuffle(lengths)
    waiting = queries_of(*lengths)
    batches = []
    while waiting:
        batch = policy.plan(view(waiting, num_slots=5)).admit
        batches.append(sorted(query.max_new_tokens for query in batch))
        waiting = [query for query in waiting if query not in batch]
    # The 25 queries of each quarter are five batches of five, and no batch mixes two quarters.
    assert len(batches) == 20
    assert all((batch[0] - 1) // 25 == (batch[-1] - 1) // 25 for batch in batches)


def test_bins_by_prompt_and_by_prediction():
    prompts = [make_query(id, 100 - prompt, prompt) for id, prompt in enumerate((3, 50, 60, 4))]
    by_prompt = policies.get("multi_bin", bins=2, edges=[10], length="prompt")
    assert admitted(by_prompt, prompts) == [1, 2]
    predicted = policies.get("multi_bin", bins=2, edges=[1], length=lambda query: query.id % 2)
    assert admitted(predicted, prompts) == [0, 2]


def test_batches_are_smaller_than_the_slots_if_wanted():
    policy = policies.get("multi_bin", bins=1, batch_size=2)
    assert admitted(policy, queries_of(1, 2, 3), num_slots=3) == [0, 1]
    assert admitted(policy, queries_of(1, 2, 3), num_slots=1) == [0]


def formula(batch: int, bins: int, low: float, high: float) -> float:
    """Queries per step, for lengths that are uniform in [low, high]: section 3 of the paper."""
    spread = (batch - 1) / (batch + 1) * (high - low) / (2 * bins)
    return batch / ((low + high) / 2 + spread)


@pytest.mark.parametrize("bins", [1, 2, 4, 16])
@pytest.mark.parametrize("batch", [8, 32])
def test_throughput_is_the_formula_of_the_paper(batch, bins):
    """Slots are counted, not timed: a batch takes one step per token of its longest answer."""
    low, high = 1, 1000
    numbers = random.Random(100 * batch + bins)
    # A queue of forty batches, refilled as it is served.
    arriving = iter([make_query(id, numbers.randint(low, high)) for id in range(300 * batch)])
    waiting = deque(next(arriving) for _ in range(40 * batch))
    policy = policies.get("multi_bin", bins=bins)
    steps = served = 0
    while True:
        plan = policy.plan(view(waiting, num_slots=batch, more_to_come=True))
        assert len(plan.admit) == batch
        steps += max(query.max_new_tokens for query in plan.admit)
        served += batch
        chosen = set(plan.admit)
        waiting = deque(query for query in waiting if query not in chosen)
        refill = [query for _, query in zip(range(batch), arriving, strict=False)]
        if len(refill) < batch:
            break
        waiting.extend(refill)
    assert served / steps == pytest.approx(formula(batch, bins, low, high), rel=0.03)
    assert served / steps < formula(batch, 10**9, low, high)
