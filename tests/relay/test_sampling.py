"""Which tokens may be drawn, with what probability, and that a draw depends only on its query."""

import math

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from baton_engines.query.sampler import Sampler
from baton_engines.query.sampling import candidates, choose_next, draw_tokens
from baton_engines.query.sampling_options import SamplingOptions
from baton_engines.query.serving import Serving
from baton_engines.query.stopping import Stopper
from baton_engines.relay import Relay
from baton_engines.testing import FakeLlama
from baton_kernels.testing import cpu_threads


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.float(), expected.float())


def likeliest(logits: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return candidates(logits, SamplingOptions(**options))


def drawn_by(logits: torch.Tensor, count: int, *, seed: int = 0, **options) -> list[int]:
    sampler = Sampler(SamplingOptions(**options), seed)
    numbers = [sampler.draw(position) for position in range(count)]
    return draw_tokens(logits.expand(count, -1), [sampler.options] * count, numbers)


class Waiting:
    """Stands in for a query that is ready for its next token."""

    def __init__(self, tokens=(), **options):
        self.tokens = list(tokens)
        self.serving = Serving(Sampler(SamplingOptions(**options)), Stopper())


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
    queries = [Waiting() for _ in logits]
    choices = choose_next(queries, [True] * 5, logits)
    assert [choice.finite for choice in choices] == [True, False, False, False, True]
    assert (choices[0].token, choices[4].token) == (1, 2)
    assert choose_next([], [], torch.empty(0, 3)) == []
    # A row whose prompt is not complete has no token yet, and draws none.
    choices = choose_next([Waiting(temperature=1.0)] * 5, [False] * 5, logits)
    assert [choice.finite for choice in choices] == [True, False, False, False, True]


def test_candidates_worked_out_by_hand():
    # Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1.
    logits = torch.tensor([0.5, 0.125, 0.25, 0.125]).log()
    ids, probabilities = likeliest(logits, temperature=1.0)
    # The likeliest first; among equal ones lower ids first.
    assert ids.tolist() == [0, 2, 1, 3]
    order = [0, 2, 1, 3]
    close(probabilities, logits.exp()[order])
    # Halving the temperature squares them: 0.25, 0.0625, 0.015625 twice, over their sum 0.34375.
    _, probabilities = likeliest(logits, temperature=0.5)
    close(probabilities, logits.exp().square()[order] / 0.34375)
    # The third largest is held by two tokens: both stay.
    ids, _ = likeliest(logits, temperature=1.0, top_k=3)
    assert ids.tolist() == [0, 2, 1, 3]
    ids, probabilities = likeliest(logits, temperature=1.0, top_k=2)
    assert ids.tolist() == [0, 2]
    close(probabilities, torch.tensor([2 / 3, 1 / 3]))
    # 0.5 is less than 0.6, so the next one stays; 0.75 is not.
    ids, probabilities = likeliest(logits, temperature=1.0, top_p=0.6)
    assert ids.tolist() == [0, 2]
    close(probabilities, torch.tensor([2 / 3, 1 / 3]))
    ids, probabilities = likeliest(logits, temperature=1.0, top_p=1e-9)
    assert (ids.tolist(), probabilities.tolist()) == ([0], [1.0])
    # 0.25 is half of 0.5, 0.125 less than that.
    ids, _ = likeliest(logits, temperature=1.0, min_p=0.4)
    assert ids.tolist() == [0, 2]


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
    ids, probabilities = likeliest(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    found = torch.zeros(vocab_size).index_put((ids,), probabilities.float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(found > 0, expected > 0)


@pytest.mark.parametrize("temperature", [1e-6, 1e-5, 1e-3, 1e30])
def test_extreme_temperatures_stay_finite(temperature):
    ids, probabilities = likeliest(torch.tensor([1e30, 9e29, -1e30]), temperature=temperature)
    assert torch.isfinite(probabilities).all()
    assert probabilities.sum().item() == pytest.approx(1)
    assert ids[probabilities.argmax()] == 0


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.25, 0.2, 0.05]).log()
    drawn = torch.tensor(drawn_by(logits, 4000, temperature=1.0, seed=5))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, logits.exp(), rtol=0, atol=0.03)
    drawn = torch.tensor(drawn_by(logits, 4000, temperature=1.0, top_k=3, seed=5))
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(
        shares, logits.exp() * torch.tensor([1, 1, 1, 0]) / 0.95, rtol=0, atol=0.03
    )
    assert set(drawn_by(logits, 200, temperature=1.0, top_k=2, seed=5)) == {0, 1}


def test_a_seed_fixes_the_draws():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))

    def draws(seed):
        return drawn_by(logits, 20, temperature=2.0, seed=seed)

    assert draws(1) == draws(1) != draws(2)


def test_tokens_without_probability_are_never_drawn():
    logits = torch.full((64,), -1e9)
    logits[17] = 0.0
    assert set(drawn_by(logits, 200, temperature=1.0)) == {17}


SETTINGS = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_k": 700},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 5.0, "top_p": 0.999},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
)


@pytest.mark.parametrize("kind", ["smooth", "ties"])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_are_drawn_as_if_alone(kind, threads):
    """Bits do not depend on the other rows, not even where many logits are equal."""
    options = [SamplingOptions(**setting) for setting in SETTINGS * 3]
    logits = 3 * torch.randn(len(options), 9000, generator=torch.Generator().manual_seed(1))
    if kind == "ties":
        logits = logits.bfloat16().float()
    numbers = torch.rand(len(options), generator=torch.Generator().manual_seed(2)).tolist()
    with cpu_threads(threads):
        together = draw_tokens(logits, options, numbers)
        alone = [
            draw_tokens(logits[row : row + 1], options[row : row + 1], numbers[row : row + 1])[0]
            for row in range(len(options))
        ]
    assert together == alone
    for row, option in enumerate(options):
        ids, probabilities = candidates(logits[row], option)
        assert together[row] in ids
        if option.restricts:
            place = torch.searchsorted(probabilities.cumsum(0), numbers[row], right=True)
            assert abs(ids.tolist().index(together[row]) - int(place)) <= 1


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
