"""Which tokens may be drawn, with what probability, and that a draw is the query's own affair."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from baton_engines.query.sampling import Sampler, candidates, greedy
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama


def test_greedy_is_the_arg_max_and_says_what_is_not_finite():
    logits = torch.tensor(
        [
            [0.0, 3.0, 1.0],
            [2.0, math.nan, 1.0],
            [5.0, 0.0, math.inf],
            [5.0, 0.0, -math.inf],
            [-9.0, -8.0, -7.0],
        ]
    )
    tokens, finite = greedy(logits)
    assert (tokens[0], tokens[4]) == (1, 2)
    assert finite == [True, False, False, False, True]
    assert greedy(torch.empty(0, 3)) == ([], [])


def test_candidates_worked_out_by_hand():
    # Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1.
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    ids, probabilities = candidates(logits, temperature=1.0)
    assert ids.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(probabilities, logits.exp())
    # Halving the temperature squares them: 0.25, 0.0625, 0.015625 twice, over their sum 0.34375.
    _, probabilities = candidates(logits, temperature=0.5)
    torch.testing.assert_close(probabilities, logits.exp().square() / 0.34375)
    # The third largest is held by two tokens: both stay.
    ids, _ = candidates(logits, temperature=1.0, top_k=3)
    assert ids.tolist() == [0, 1, 2, 3]
    ids, probabilities = candidates(logits, temperature=1.0, top_k=2)
    assert ids.tolist() == [0, 2]
    torch.testing.assert_close(probabilities, torch.tensor([2 / 3, 1 / 3]))
    # 0.5 is less than 0.6, so the next one stays; 0.75 is not.
    ids, probabilities = candidates(logits, temperature=1.0, top_p=0.6)
    assert ids.tolist() == [0, 2]
    torch.testing.assert_close(probabilities, torch.tensor([2 / 3, 1 / 3]))
    ids, probabilities = candidates(logits, temperature=1.0, top_p=1e-9)
    assert (ids.tolist(), probabilities.tolist()) == ([0], [1.0])


@pytest.mark.parametrize("vocab_size", [7, 1000, 5000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("top_k", [0, 1, 5, 10_000])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
def test_candidates_are_those_of_hugging_face(vocab_size, temperature, top_k, top_p):
    logits = 3 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores[0], dim=-1)
    ids, probabilities = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    found = torch.zeros(vocab_size).index_put((ids,), probabilities)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    ids, probabilities = candidates(torch.tensor([1e30, 9e29, -1e30]), temperature=temperature)
    assert torch.isfinite(probabilities).all()
    assert probabilities.sum().item() == pytest.approx(1)
    assert ids[probabilities.argmax()] == 0


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    sampler = Sampler(temperature=1.0, seed=5)
    drawn = torch.tensor([sampler.sample(logits) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.03)
    narrow = Sampler(temperature=1.0, top_k=2, seed=5)
    assert {narrow.sample(logits) for _ in range(200)} == {0, 1}


def test_a_seed_fixes_the_draws():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))

    def draws(seed):
        sampler = Sampler(temperature=2.0, seed=seed)
        return [sampler.sample(logits) for _ in range(20)]

    assert draws(1) == draws(1) != draws(2)


def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((64,), -1e9)
    logits[17] = 0.0
    sampler = Sampler(temperature=1.0, seed=0)
    assert {sampler.sample(logits) for _ in range(200)} == {17}


def submit_sampled(relay: Relay, seeds, **options) -> list:
    common = {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "max_new_tokens": 9, **options}
    return [relay.submit([seed, 3], seed=seed, **common) for seed in seeds]


@pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
def test_sampled_tokens_do_not_depend_on_neighbors(aligned):
    alone = []
    for seed in range(8):
        relay = Relay(FakeLlama(), 1, 32)
        alone += submit_sampled(relay, [seed])
        relay.run()
    relay = Relay(FakeLlama(), 3, 32, aligned=aligned)
    together = submit_sampled(relay, range(8))
    greedy_one = relay.submit([1], max_new_tokens=5)
    relay.step()
    relay.cancel(greedy_one)
    relay.preempt(together[1])
    relay.step()
    relay.resize(2)
    relay.resume(together[1])
    relay.run()
    assert [query.tokens for query in together] == [query.tokens for query in alone]
    assert len({tuple(query.tokens) for query in together}) == 8


def test_a_repeated_step_draws_once():
    def expected(seed):
        relay = Relay(FakeLlama(), 1, 32)
        (query,) = submit_sampled(relay, [seed])
        relay.run()
        return query.tokens

    relay = Relay(FakeLlama(), 4, 32)
    queries: list = []

    def bounce(query, _):
        for other in queries:
            if relay.preempt(other):
                relay.resume(other)

    queries += submit_sampled(relay, range(3), on_token=bounce)
    relay.run()
    assert [query.tokens for query in queries] == [expected(seed) for seed in range(3)]


def test_the_default_seed_is_the_id():
    first, second = Relay(FakeLlama(), 2, 32), Relay(FakeLlama(), 2, 32)
    options = {"temperature": 1.0, "max_new_tokens": 8}
    plain = [first.submit([4], **options) for _ in range(3)]
    seeded = [second.submit([4], **options, seed=id) for id in range(3)]
    first.run()
    second.run()
    assert [query.tokens for query in plain] == [query.tokens for query in seeded]
    assert plain[0].tokens != plain[1].tokens
