"""A query gets the same in a batch that others enter and leave as by itself: not only tokens but
logits, compared with the unpatched transformers model and, bit for bit, with a one-slot relay."""

import copy

import pytest
import torch
from gpus import needs_gpu
from relay_workload import CAPACITY, Workload, make_model
from transformers import LlamaForCausalLM

from baton_engines.relay import Relay

LAYOUTS = pytest.mark.parametrize("aligned", [False, True], ids=["ragged", "aligned"])
POLICIES = pytest.mark.parametrize("policy", ["baton", "run_to_completion"])


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def unpatched(model) -> LlamaForCausalLM:
    return copy.deepcopy(model)


@LAYOUTS
@POLICIES
@torch.inference_mode()
def test_logits_are_those_of_the_unpatched_model_alone(model, unpatched, policy, aligned):
    with Relay(model, 5, CAPACITY, policy, aligned=aligned) as relay:
        workload = Workload(relay, seed=1)
        workload.run()
    check_logits(workload, unpatched)


@needs_gpu
@pytest.mark.parametrize("prefill", ["serial", "overlapped"])
@LAYOUTS
@torch.inference_mode()
def test_gpu_logits_are_those_of_the_unpatched_model_on_the_cpu(unpatched, aligned, prefill):
    model = copy.deepcopy(unpatched).to("cuda")
    with Relay(model, 5, CAPACITY, aligned=aligned, prefill=prefill) as relay:
        workload = Workload(relay, seed=1)
        workload.run()
    check_logits(workload, unpatched)


def check_logits(workload: Workload, unpatched: LlamaForCausalLM) -> None:
    worst = 0.0
    for query in workload.queries:
        if not query.tokens:
            assert query.status == "cancelled"
            continue
        whole = torch.tensor([query.prompt + query.tokens[:-1]])
        expected = unpatched(whole).logits[0, len(query.prompt) - 1 :]
        found = torch.stack(workload.logits[query.id]).cpu()
        assert found.dtype == torch.float32 and found.shape == expected.shape
        worst = max(worst, ((found - expected).abs().max() / expected.abs().max()).item())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert query.tokens == expected.argmax(-1).tolist()
    assert worst < 1e-4


@torch.inference_mode()
def test_tokens_are_those_of_generate_alone(model, unpatched):
    with Relay(model, 5, CAPACITY) as relay:
        workload = Workload(relay, seed=2)
        workload.run()
    for query in workload.queries:
        if query.status == "finished":
            alone = unpatched.generate(
                torch.tensor([query.prompt]),
                attention_mask=torch.ones(1, len(query.prompt), dtype=torch.int64),
                max_new_tokens=query.max_new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            assert query.tokens == alone[0, len(query.prompt) :].tolist()


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_logits_and_draws_are_the_bits_of_a_relay_of_one_slot(dtype, aligned):
    model = make_model(dtype)
    options = {"temperature": 0.8, "top_p": 0.95}
    with Relay(model, 5, CAPACITY, aligned=aligned) as relay:
        together = Workload(relay, seed=3, **options)
        together.run()
    with Relay(model, 1, CAPACITY) as relay:
        alone = Workload(relay, seed=0)
        for query in together.queries:
            alone.queries.append(
                relay.submit(query.prompt, max_new_tokens=query.max_new_tokens, **options)
            )
        relay.run()
    for query, other in zip(together.queries, alone.queries, strict=True):
        count = len(query.tokens)
        assert query.tokens == other.tokens[:count]
        pairs = zip(together.logits.get(query.id, []), alone.logits[query.id], strict=False)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_the_model_is_what_it_was_after_the_relay(model, unpatched):
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match="num_slots"):
        Relay(model, 0)
    with Relay(model, 2, 16) as relay:
        relay.submit([1, 2], max_new_tokens=3)
        relay.run()
    assert before == {name: id(parameter) for name, parameter in model.named_parameters()}
    for one, two in zip(model.parameters(), unpatched.parameters(), strict=True):
        assert torch.equal(one, two)
    assert "forward" not in vars(model)


def test_weights_that_are_not_finite_fail_queries_with_a_clear_error(unpatched):
    broken = copy.deepcopy(unpatched)
    with torch.no_grad():
        broken.model.embed_tokens.weight[13] = torch.nan
    with Relay(broken, 3, CAPACITY) as relay:
        queries = [relay.submit([n, 5, n], max_new_tokens=4) for n in (12, 13, 14)]
        relay.run()
    good, bad, also_good = queries
    assert "logits of query 1 must be finite" in str(bad.error)
    assert good.error is None or "must be finite" in str(good.error)
    with Relay(unpatched, 1, CAPACITY) as relay:
        alone = [relay.submit([n, 5, n], max_new_tokens=4) for n in (12, 14)]
        relay.run()
    for query, other in zip((good, also_good), alone, strict=True):
        assert query.tokens == other.tokens[: len(query.tokens)]
        # A query that generates the broken token itself fails there and not before.
        assert query.status == "finished" or query.tokens[-1] == 13
