"""`bench.weights` on a small model: its perplexity is the model's own, and steps take turns."""

import math

import pytest
import torch
from bench_package import import_bench

from baton_engines import patch_llama
from baton_engines.testing.small_llama import small_llama

weights, perplexity = import_bench("weights"), import_bench("perplexity")


def test_a_reading_is_the_models_own():
    model = small_llama(dtype=torch.float32)
    ids = torch.arange(1, 24)
    with patch_llama(model, keep_parameters=True) as own:
        reading, own_bytes = perplexity.read(own, ids, 12), own.weight_bytes
    losses, likeliest = [], []
    for window in ids.split(12):
        logits = model(window[None]).logits[0, :-1].detach().double()
        losses.append(-logits.log_softmax(1).gather(1, window[1:, None])[:, 0])
        likeliest.append(logits.argmax(1))
    expected = torch.cat(losses)
    torch.testing.assert_close(reading.losses, expected, rtol=1e-4, atol=1e-5)
    assert reading.perplexity == pytest.approx(math.exp(expected.mean().item()), rel=1e-4)
    assert torch.equal(reading.logits.argmax(1), torch.cat(likeliest))
    with patch_llama(model, weight_dtype="int8", keep_parameters=True) as low:
        rounded = perplexity.read(low, ids, 12)
        assert low.weight_bytes < own_bytes / 2
    # The logits differ by as much as in tests/llama/test_int8_weights.py.
    error = (rounded.losses - reading.losses).square().mean() / reading.losses.square().mean()
    assert 0 < error.sqrt() < 0.05


def test_steps_take_turns():
    order = []
    models = [small_llama(), small_llama()]
    with patch_llama(models[0]) as own, patch_llama(models[1], weight_dtype="int8") as low:
        for patched in (own, low):
            forward = patched.forward

            def counted(*args, forward=forward, patched=patched, **kwargs):
                order.append(patched)
                return forward(*args, **kwargs)

            patched.forward = counted
        seconds = weights.step_seconds([own, low], 2, 5, 3)
        assert order[-6:] == [own, low] * 3
    assert len(seconds) == 2 and min(seconds) > 0
