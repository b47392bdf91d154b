"""The cost of rounding keys and values, on a small model."""

import math

import pytest
import torch
from bench_package import import_bench

from baton_engines import patch_llama
from baton_engines.testing.small_llama import small_llama


@pytest.fixture(scope="module")
def quality():
    return import_bench("kv_quality")


def test_shares_and_errors_by_hand(quality):
    assert quality.equal_share([[1, 2, 3, 4], [5, 6]], [[1, 2, 9, 4], [5, 6]]) == 4 / 6
    exact = torch.tensor([[1.0, -1.0], [3.0, 5.0]])
    assert quality.logit_error(exact, exact) == 0.0
    # Both spread by 1 around their mean; one of four is off by 1.
    assert quality.logit_error(exact + torch.tensor([[1.0, 0.0], [0.0, 0.0]]), exact) == 0.5
    reading = quality.perplexity.Reading(torch.tensor([math.log(2.0)] * 3), exact)
    assert reading.perplexity == pytest.approx(2)
    flipped = exact.flip(1) * torch.tensor([[-1.0], [1.0]])
    other = quality.perplexity.Reading(reading.losses, flipped)
    assert other.same_likeliest(reading) == 0.5


def test_a_text_and_answers(quality):
    model = small_llama()
    token_ids = torch.randint(0, 97, (50,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = model(token_ids[None, :20]).logits[0, :-1].float()
        plain = quality.plain_reading(model, token_ids, 20)
        prompts = [token_ids[:5].tolist(), token_ids[5:9].tolist()]
        plain_tokens = quality.plain_answers(model, prompts, 8)
    losses = -whole.log_softmax(1).gather(1, token_ids[1:20, None])[:, 0]
    with torch.inference_mode(), patch_llama(model) as llama:
        exact = quality.perplexity.read(llama, token_ids, 20, None)
        # Windows of 20, 20 and 10.
        assert len(exact.losses) == len(exact.logits) == 19 + 19 + 9
        torch.testing.assert_close(exact.losses[:19].float(), losses, rtol=1e-4, atol=1e-4)
        rounded = quality.perplexity.read(llama, token_ids, 20, torch.int8)
        assert 0 < quality.logit_error(rounded.logits, exact.logits) < 0.1
        assert quality.logit_error(plain.logits, exact.logits) < 1e-4
        assert plain_tokens == quality.answers(llama, prompts, 8, None)
        tokens = quality.answers(llama, prompts, 8, torch.int8)
        assert [len(one) for one in tokens] == [8, 8]
        assert tokens == quality.answers(llama, prompts, 8, torch.int8)
